"""Train one stage.

    deepspeed trainer/run.py --config configs/tiny.yaml --stage base --data SHARDS --output runs/base
    deepspeed trainer/run.py --config configs/wan-1.3b.yaml --stage dual_stream --dry-run

The same command again goes on where the last one stopped. On SIGTERM or SIGUSR1 it saves and leaves with status 85. The
result is OUTPUT/model; Stage I also leaves OUTPUT/teacher, the real score of Stage II; LoRA leaves OUTPUT/adapter too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, from anywhere

# A rank that fails takes its connections with it; torch would print a stack of its own for each on the other ranks.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# DeepSpeed looks for an accelerator on import; a machine without one is a CPU machine, not an error.
if "DS_ACCELERATOR" not in os.environ:
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"

from common.config import load_section
from common.errors import UserError
from pipeline.model.config import ModelConfig


def main() -> None:
    arguments = parse_arguments()
    from trainer.config import TrainerConfig

    model = load_section(arguments.config, "model", ModelConfig, arguments.overrides)
    config = load_section(arguments.config, "trainer", TrainerConfig, arguments.overrides)
    first = os.environ.get("RANK", "0") == "0"
    if arguments.dry_run:
        from trainer.planning.dry_run import describe

        if first:
            print(describe(arguments.stage, model, config, gpus=arguments.gpus))
        return
    if arguments.data is None or arguments.output is None:
        raise UserError("--data and --output are needed (only --dry-run goes without)")
    finished = train_stage(arguments, model, config)
    if not finished:
        from trainer.loop import EXIT_SAVED_ON_SIGNAL

        if first:
            print("saved; the same command goes on from here", flush=True)
        _leave(EXIT_SAVED_ON_SIGNAL)
    _leave(0)


def train_stage(arguments: argparse.Namespace, model: ModelConfig, config: Any) -> bool:
    """Everything between checked arguments and the exported model. Returns whether the stage is finished."""
    from datagen.dataset.loader import ShardReader
    from pipeline.model.prompts import load_prompts
    from pipeline.model.sequence_parallel import form_sequence_groups
    from pipeline.model.vae import load_vae
    from trainer.best import check_kept, load_best
    from trainer.build import build_stage, check_roles, initial_transformer
    from trainer.engine.lora import merged_state, restore_adapter, save_adapter
    from trainer.engine.network import start_distributed
    from trainer.export import code_version, export_model
    from trainer.loop import Run, train
    from trainer.monitoring.validation import Validation, fixed_batch

    stage_name = arguments.stage
    check_roles(stage_name, arguments.init, arguments.teacher)
    vae, prompts = load_vae(model.vae), load_prompts(model.prompts)
    world = start_distributed()
    sequence = form_sequence_groups(config.sequence_parallel)
    #: what reads samples of its own: a rank, or a group of ranks that share clips
    readers = world.size // sequence.size
    schedule = config.schedule_of(stage_name)
    if arguments.export == "best":
        check_kept(stage_name, schedule)
    accumulation = config.engine_of("student").gradient_accumulation
    micro_batch, remainder = divmod(schedule.global_batch_size, accumulation * readers)
    if remainder or micro_batch == 0:
        raise UserError(
            f"trainer.schedules.{stage_name}.global_batch_size = {schedule.global_batch_size} is not a multiple of "
            f"{readers} {'ranks' if sequence.size == 1 else 'groups of ranks'} x {accumulation} accumulated "
            "micro-batches"
        )
    members = ("pair",) if stage_name == "preference" else ("latents",)

    def reader(samples: int, seed: int) -> ShardReader:
        return ShardReader(
            arguments.data,
            members=members,
            seed=seed,
            global_batch_size=samples * readers,
            rank=world.rank // sequence.size,
            world_size=readers,
            cache_dir=config.shard_cache,
            damaged=config.damaged_samples,
        )

    training_reader = reader(micro_batch, config.seed)
    settings = {
        "stage": stage_name,
        "model": model.model_dump(mode="json"),
        "trainer": config.model_dump(mode="json"),
        "data": {
            "folder": str(arguments.data),
            **training_reader.manifest.model_dump(mode="json", exclude={"shards"}),
        },
        "parents": {
            name: str(folder) for name in ("init", "teacher") if (folder := getattr(arguments, name))
        },
        "code": code_version(),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)

    def export(name: str, state: dict[str, Any], steps: int, metrics: dict[str, float] | None = None) -> None:
        if world.rank != 0:
            return
        if (lora := config.lora_of("student")) is not None:
            base = initial_transformer(arguments.init, model, config.seed)
            adapted = restore_adapter(base, lora, state, arguments.init or model.initial_weights)
            if name == "model":
                save_adapter(arguments.output / "adapter", adapted)
            state = merged_state(adapted)
        export_model(
            arguments.output / name, state, model, vae, prompts,
            steps=steps, dtype=_dtype(config.export_precision), card={**settings, "metrics": metrics or {}},
        )  # fmt: skip

    def keep_teacher(state: dict[str, Any]) -> None:
        export("teacher", state, model.base_steps)
        if world.rank == 0 and config.progressive.guidance_iterations == 0:
            print(
                f"{arguments.output / 'teacher'} is the base as it is, since guidance_iterations is 0; "
                "trainer.dual_stream.real_score_guidance guides it in Stage II",
                flush=True,
            )

    stage = build_stage(
        stage_name,
        config,
        model,
        init=arguments.init,
        teacher=arguments.teacher,
        embed=prompts.embed,
        world=world,
        keep_teacher=keep_teacher,
        sequence=sequence,
    )
    validation = None
    if schedule.validate_every:
        batch = fixed_batch(reader(config.validation_clips, config.seed + 1))
        validation = Validation(batch, vae if world.rank == 0 else None, world.device)
    run = Run(
        stage,
        training_reader,
        config,
        schedule,
        config.steps_of(stage_name),
        arguments.output,
        world,
        settings,
        validation=validation,
        stop_after=arguments.stop_after,
    )
    if not train(run):
        return False
    if arguments.export == "best":
        load_best(run)
    state = stage.exported.full_state_dict(ema=stage.exported.ema is not None)
    export("model", state, model.base_steps if stage_name == "base" else 1, run.metrics)
    if world.rank == 0:
        print(f"model: {arguments.output / 'model'}", flush=True)
    return True


def _dtype(precision: str) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="preset, for instance configs/tiny.yaml")
    parser.add_argument(
        "--stage", required=True, choices=("base", "progressive", "dual_stream", "preference")
    )
    parser.add_argument("--data", help="dataset folder or s3:// prefix (pairs for --stage preference)")
    parser.add_argument(
        "--output", type=Path, help="folder of the run; existing checkpoints there are resumed"
    )
    parser.add_argument("--init", type=Path, help="model folder the student starts from")
    parser.add_argument("--teacher", type=Path, help="model folder of the real score (--stage dual_stream)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override a value",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration, sizes and memory; needs no GPU"
    )
    parser.add_argument(
        "--export",
        choices=("last", "best"),
        default="last",
        help="whose weights become OUTPUT/model: the last EMA, or that of the checkpoint with the best validation",
    )
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs that --dry-run reckons with")
    parser.add_argument(
        "--stop-after", type=int, help="save and leave after this many steps, as if preempted"
    )
    parser.add_argument(
        "--local_rank", type=int, default=0, help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it
    return parser.parse_args(line)


if __name__ == "__main__":
    from trainer.engine.rank_failure import run_ranks

    run_ranks(main)
