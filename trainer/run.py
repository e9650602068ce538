"""Train one stage.

    deepspeed trainer/run.py --config configs/tiny.yaml --stage base --data SHARDS --output runs/base
    deepspeed trainer/run.py --config configs/wan-1.3b.yaml --stage dual_stream --dry-run

The same command again resumes from the latest checkpoint. On SIGTERM or SIGUSR1 it saves and exits with status 85. The
result is OUTPUT/model; Stage I also writes OUTPUT/teacher, the real score of Stage II; LoRA writes OUTPUT/adapter too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, from anywhere

# A rank that fails takes its connections with it; torch would print a stack of its own for each on the other ranks.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# DeepSpeed looks for an accelerator on import; a machine without one is a CPU machine, not an error.
if "DS_ACCELERATOR" not in os.environ:
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"

from common.command_line import add_config_options, load_sections
from common.errors import UserError
from common.storage import StorageConfig
from pipeline.model.config import ModelConfig
from trainer.config import config_class
from trainer.stages import STAGES, find_stage

if TYPE_CHECKING:
    from trainer.train import TrainingJob


def main() -> None:
    arguments = parse_arguments()
    first = os.environ.get("RANK", "0") == "0"
    if arguments.dry_run:
        from trainer.planning.dry_run import describe

        stage = find_stage(arguments.stage)
        model, config = load_sections(arguments, model=ModelConfig, trainer=config_class(stage))
        if first:
            print(describe(stage, model, config, gpus=arguments.gpus))
        return
    job = training_job(arguments)
    from trainer.preemption import EXIT_SAVED_ON_SIGNAL
    from trainer.train import train

    if train(job):
        _leave(0)
    if first:
        print("saved; run the same command again to resume", flush=True)
    _leave(EXIT_SAVED_ON_SIGNAL)


def training_job(arguments: argparse.Namespace) -> TrainingJob:
    """From the command line's arguments.

    Raises:
        UserError: an argument or a value of the configuration is missing or wrong.
    """
    stage = find_stage(arguments.stage)
    model, config, storage = load_sections(
        arguments, model=ModelConfig, trainer=config_class(stage), storage=StorageConfig
    )
    if arguments.data is None or arguments.output is None:
        raise UserError("--data and --output are needed (only --dry-run goes without)")
    from trainer.train import TrainingJob

    return TrainingJob(
        stage,
        model,
        config,
        data=arguments.data,
        output=arguments.output,
        validation_data=arguments.validation_data,
        init=arguments.init,
        teacher=arguments.teacher,
        export=arguments.export,
        stop_after=arguments.stop_after,
        restart=arguments.restart,
        storage=storage,
    )


def _leave(status: int) -> None:
    """End together: a rank that is gone early makes the others' last collective fail."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.exit(status)


def parse_arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line, or of `line`."""
    stages = "\n".join(f"  {name:<13} {spec.summary}" for name, spec in STAGES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nstages:\n{stages}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_options(parser)
    parser.add_argument(
        "--stage", required=True, help=f"{', '.join(STAGES)}, or package.module:SPEC for one of your own"
    )
    parser.add_argument("--data", help="dataset folder or s3:// prefix (pairs for --stage preference)")
    parser.add_argument(
        "--validation-data",
        help="the same of held-out clips; left out: the validation split of --data, without which none is done",
    )
    parser.add_argument("--output", type=Path, help="folder of the run; existing checkpoints there are resumed")
    parser.add_argument("--init", type=Path, help="model folder the student starts from")
    parser.add_argument("--teacher", type=Path, help="model folder of the real score (Stage II)")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, sizes and memory; needs no GPU")
    parser.add_argument(
        "--export",
        choices=("last", "best"),
        default="last",
        help="whose weights become OUTPUT/model: the last EMA, or that of the checkpoint with the best validation",
    )
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs that --dry-run computes with")
    parser.add_argument(
        "--restart", action="store_true", help="begin at step 0; what --output holds is kept in before-restart-N there"
    )
    parser.add_argument("--stop-after", type=int, help="save and exit after this many steps, as if preempted")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(line)


if __name__ == "__main__":
    from trainer.engine.rank_failure import run_ranks

    run_ranks(main)
