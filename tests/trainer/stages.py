"""One `Run` of each stage in this process, on the toy preset: for tests of the loop and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from datagen.dataset.loader import ShardReader
from pipeline.model.config import ModelConfig
from pipeline.model.prompts import load_prompts
from pipeline.model.vae import load_vae
from tests.trainer.presets import TRAINER
from trainer.config import TrainerConfig
from trainer.engine.process_group import World
from trainer.loop import Run
from trainer.monitoring.validation import Validation, fixed_batch
from trainer.stages import STAGES as SPECS
from trainer.train import build_stage

STAGES = tuple(SPECS)


def make_run(preset: Path, stage: str, output: Path, world: World, **changes: Any) -> Run:
    """As trainer/run.py makes it, all models being random. Collective.

    Args:
        changes: fields of `Run` (stop_after) or of the `trainer` section.
    """
    output.mkdir(exist_ok=True)
    stop_after = changes.pop("stop_after", None)
    model = ModelConfig(**yaml.safe_load(preset.read_text())["model"])
    config = TrainerConfig(**(TRAINER | changes))
    spec, schedule = SPECS[stage], config.schedules[stage]

    def reader(seed: int) -> ShardReader:
        return ShardReader(
            preset.parent / ("pairs" if stage == "preference" else "clips"),
            members=spec.members,
            seed=seed,
            global_batch_size=schedule.global_batch_size,
            rank=world.rank,
            world_size=world.size,
        )

    built = build_stage(
        spec, config, model, init=None, teacher=None, embed=load_prompts(model.prompts).embed, world=world
    )
    settings = {"trainer": config.model_dump(mode="json")}
    validation = None
    if schedule.validate_every:
        validation = Validation(fixed_batch(reader(config.seed + 1)), load_vae(model.vae))
    return Run(
        built,
        reader(config.seed),
        config,
        schedule,
        config.steps_of(spec),
        output,
        world,
        settings,
        validation=validation,
        stop_after=stop_after,
    )
