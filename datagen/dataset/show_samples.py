"""Show what is in a dataset: a table of samples, and their pictures.

python -m datagen.dataset.show_samples DIR [--samples 12] [--output sheet.png]
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from common.command_line import add_config_options, load_sections
from common.errors import UserError, run_command
from common.storage import StorageConfig, open_folder
from datagen.dataset.data_card import contact_sheet
from datagen.dataset.shard_format import read_manifest

#: pictures beside each other on the sheet
COLUMNS = 4


def main() -> None:
    arguments = _arguments()
    (storage,) = load_sections(arguments, storage=StorageConfig)
    folder = open_folder(arguments.dataset, storage)
    manifest = read_manifest(folder)
    console = Console()
    console.print(f"{arguments.dataset}: {manifest.kind}, {manifest.samples} samples in {len(manifest.shards)} shards")
    if manifest.kind != "clips":
        raise UserError(f"{arguments.dataset} holds {manifest.kind}; this command shows datasets of clips")
    sheet = contact_sheet(folder, manifest, arguments.samples)
    table = Table("source", "frames", "crop", "recipe", "bicubic dB", "draws", show_lines=True)
    for sample in sheet:
        metadata = sample["metadata"]
        first, crop = metadata["window"]["start"], metadata["crop"]
        table.add_row(
            metadata["source"],
            f"{first}…{first + metadata['window']['frames'] - 1}",
            f"{crop['width']}x{crop['height']}+{crop['left']}+{crop['top']}",
            metadata["recipe"],
            f"{metadata['lr_psnr_db']:.1f}",
            sample["draws"],
        )
    console.print(table)
    if arguments.output:
        _write_sheet([sample["picture"] for sample in sheet], arguments.output)


def _write_sheet(pictures: list[str | None], output: Path) -> None:
    decoded = [
        np.asarray(cv2.imdecode(np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR))
        for uri in pictures
        if uri
    ]
    if not decoded:
        raise UserError("the dataset keeps no clips (store_clips: false): there are no pictures to show")
    decoded += [np.zeros_like(decoded[0])] * (-len(decoded) % COLUMNS)
    rows = [np.hstack(decoded[first : first + COLUMNS]) for first in range(0, len(decoded), COLUMNS)]
    if not cv2.imwrite(str(output), np.vstack(rows)):
        raise UserError(f"{output} cannot be written; use .png or .jpg in a folder that exists")
    print(f"{output}: LR | HR of {sum(uri is not None for uri in pictures)} samples")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m datagen.dataset.show_samples", description="Show samples of a dataset."
    )
    parser.add_argument("dataset", help="folder or s3:// prefix")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--output", type=Path, help="also write a sheet of pictures, .png or .jpg")
    add_config_options(parser, required=False)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
