"""The GPU kit: is the trainer right on this GPU?

    python benchmarks/gpu/run.py checks                            # meant for 4 minutes of one GPU
    python benchmarks/gpu/run.py checks --device cpu --size toy    # a try on a CPU

Writes gpu_checks_<device>.json and .md into --output, after every row. The last line printed is JSON. Exit status 1: a
row failed. benchmarks/gpu/README.md says what the rows mean.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # started as a file, from anywhere

from common.errors import UserError, run_command  # noqa: E402


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cpu":  # before torch looks for a GPU
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; choose --device cpu")
    from benchmarks.gpu.checks import run
    from benchmarks.gpu.table import Table
    from trainer.engine.process_group import start_distributed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    world = start_distributed()
    table = Table(arguments.output, arguments.part, about(arguments), arguments.minutes)
    run(table, arguments.size, world)
    torch.distributed.destroy_process_group()
    print(json.dumps({"part": arguments.part, "rows": table.rows, "failed": table.failed}), flush=True)
    sys.exit(bool(table.failed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("checks",))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the tables")
    parser.add_argument("--minutes", type=float, default=4.0, help="after which no row is begun")
    return parser.parse_args()


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured with."""
    import torch

    on_gpu = arguments.device == "cuda"
    return {
        "command": f"python benchmarks/gpu/run.py {' '.join(sys.argv[1:])}",
        "date": str(datetime.date.today()),
        "device": arguments.device,
        "name": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "deepspeed", "diffusers")},
    }


if __name__ == "__main__":
    run_command(main)
