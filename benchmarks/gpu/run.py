"""The GPU kit: is the trainer right on this GPU, how fast is it, and a stretch of training.

    python benchmarks/gpu/run.py checks                            # meant for 4 minutes of one GPU
    python benchmarks/gpu/run.py speed                             # for 5
    python benchmarks/gpu/run.py train --data SHARDS --run FOLDER  # for 9; again to go on
    python benchmarks/gpu/run.py checks --device cpu --size toy    # a try on a CPU

Writes gpu_<part>_<device>.json and .md into --output, after every row. The last line printed is JSON. Exit status 1: a
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

#: of a GPU, that each part is meant for
MINUTES = {"checks": 4.0, "speed": 5.0, "train": 9.0}


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cpu":  # before torch looks for a GPU
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; choose --device cpu")
    from benchmarks.gpu import checks, speed, train
    from benchmarks.gpu.table import Table
    from trainer.engine.process_group import start_distributed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    world = start_distributed()
    minutes = MINUTES[arguments.part] if arguments.minutes is None else arguments.minutes
    table = Table(arguments.output, arguments.part, about(arguments), minutes)
    if arguments.part == "train":
        if arguments.data is None or arguments.run is None:
            raise UserError("train needs --data SHARDS and --run FOLDER")
        part = train.TrainingPart(
            arguments.config, arguments.stage, arguments.data, arguments.run, tuple(arguments.more)
        )
        train.run(table, part, arguments.device, minutes)
    else:
        {"checks": checks, "speed": speed}[arguments.part].run(table, arguments.size, world)
    torch.distributed.destroy_process_group()
    print(json.dumps({"part": arguments.part, "rows": table.rows, "failed": table.failed}), flush=True)
    sys.exit(bool(table.failed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(MINUTES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the tables")
    parser.add_argument(
        "--minutes", type=float, help="after which no row is begun, or training stops; default: 4, 5, 9"
    )
    training = parser.add_argument_group("train")
    training.add_argument("--config", type=Path, default=ROOT / "configs" / "small.yaml")
    training.add_argument("--stage", default="base")
    training.add_argument("--data", type=Path, help="dataset folder")
    training.add_argument("--run", type=Path, help="output folder of trainer/run.py, with its checkpoints")
    training.add_argument(
        "--more", nargs=argparse.REMAINDER, default=[], help="last: further arguments of trainer/run.py"
    )
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
