"""Videos become shards.

    python -m datagen.build_shards --config configs/tiny.yaml --input DIR --output DIR

survey (every source decoded once, small) -> plan (samples, their order, seeds, shards) -> shards -> manifest.
Each step leaves whole files; the same command after a crash goes on and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from common.config import load_section
from common.errors import run_command
from datagen.build import build
from datagen.config import DatagenConfig
from pipeline.model.config import ModelConfig


def main() -> None:
    arguments = _arguments()
    config = load_section(arguments.config, "datagen", DatagenConfig, arguments.overrides)
    model = load_section(arguments.config, "model", ModelConfig, arguments.overrides)
    # a scheduler's SIGTERM ends like any exit: temporary files are removed, committed shards stay
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    manifest = build(
        config,
        vae=model.vae,
        inputs=arguments.input,
        output=arguments.output,
        address=arguments.address,
        workers=arguments.workers,
        reuse=arguments.reuse,
    )
    print(f"{arguments.output}: {manifest.samples} samples in {len(manifest.shards)} shards")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m datagen.build_shards",
        description="Cut, degrade and encode videos into WebDataset shards; run again after a crash to go on.",
    )
    parser.add_argument("--config", type=Path, required=True, help="preset, for instance configs/tiny.yaml")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="folders, globs, .txt lists, .csv or .parquet tables (column video, optionally caption), s3:// prefixes",
    )
    parser.add_argument("--output", required=True, help="folder or s3:// prefix of the dataset")
    parser.add_argument("--address", help="Ray cluster to run on, for instance auto; default: this machine")
    parser.add_argument("--workers", type=int, help="clips in the making at once; default: one per CPU")
    parser.add_argument(
        "--reuse",
        metavar="DATASET",
        help="earlier dataset of the same clips: z_hr is taken from it, not encoded again",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override a value",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
