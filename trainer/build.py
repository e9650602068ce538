"""From configuration and folders to a stage: which weights take which role.

    stage        --init                         --teacher
    base         a model to go on from, or none  -
    progressive  the base model                  -
    dual_stream  the Stage-I student             the CFG-distilled teacher of Stage I (θ_R, and θ_F's start)
    preference   the Stage-II student            -

A teacher given to any other stage is refused. With LoRA these are the weights beside the adapters of
student and fake score; what stays frozen anyway, real score and reference, has none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from pipeline.model.attention import set_attention
from pipeline.model.config import ModelConfig
from pipeline.model.load_weights import build_transformer, load_transformer
from pipeline.model.sequence_parallel import ALONE, SequenceGroup
from pipeline.model.transformer import VSRTransformer
from trainer.config import StageName, TrainerConfig
from trainer.engine.lora import add_adapter
from trainer.engine.network import World
from trainer.stages.base import Base
from trainer.stages.dual_stream.algorithm import DualStream
from trainer.stages.preference import Preference
from trainer.stages.progressive import Progressive
from trainer.stages.stage import Stage


def check_roles(stage: StageName, init: Path | None, teacher: Path | None) -> None:
    """Fail early, before anything is loaded.

    Raises:
        UserError: a model that the stage needs was not given, or is not there.
    """
    needed = {
        "progressive": "the base model",
        "dual_stream": "the Stage-I student",
        "preference": "the Stage-II student",
    }
    if stage in needed and init is None:
        raise UserError(f"--stage {stage} starts from {needed[stage]}: give its folder with --init")
    if stage == "dual_stream" and teacher is None:
        raise UserError(
            "--stage dual_stream needs the real score: give Stage I's teacher folder with --teacher"
        )
    if stage != "dual_stream" and teacher is not None:
        raise UserError(f"--teacher is only for --stage dual_stream, not {stage}")
    for option, folder in (("--init", init), ("--teacher", teacher)):
        if folder is not None and not folder.exists():
            raise UserError(f"{option} {folder}: no such model folder")


def initial_transformer(folder: Path | None, model: ModelConfig, seed: int) -> VSRTransformer:
    """The weights of `folder`, else those that a preset begins with, float32; the same on every rank and every call."""
    if folder is not None:
        return load_transformer(folder, model.transformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_transformer(model.transformer, model.initial_weights)


def build_stage(
    stage: StageName,
    config: TrainerConfig,
    model: ModelConfig,
    *,
    init: Path | None,
    teacher: Path | None,
    embed: Callable[[list[str]], Tensor],
    world: World,
    keep_teacher: Callable[[dict[str, Tensor]], None] | None = None,
    sequence: SequenceGroup = ALONE,
) -> Stage:
    """Load the weights and wrap them in engines. Collective.

    Args:
        sequence: the ranks that share a clip with this one.
    """

    def load(folder: Path | None) -> VSRTransformer:
        network = initial_transformer(folder, model, config.seed)
        set_attention(network, config.attention, config.engine_of("student").dtype)
        network.share_sequence(sequence)
        return network

    def adapt(transformer: VSRTransformer, name: str) -> None:
        adapter = config.lora_of(name)
        if adapter is not None:
            add_adapter(transformer, adapter, network=name, seed=config.seed)

    student = load(init)
    reference = copy.deepcopy(student) if stage == "preference" else None
    adapt(student, "student")
    common = {"embed": embed, "seed": config.seed, "device": world.device}
    built: Stage
    if stage == "base":
        built = Base(config.base, student=student, engine=config.engine_of("student"), **common)
    elif stage == "progressive":
        engines = {name: config.engine_of(name) for name in ("student", "teacher")}
        built = Progressive(
            config.progressive, student=student, engines=engines, keep_teacher=keep_teacher, **common
        )
    elif reference is not None:
        engines = {name: config.engine_of(name) for name in ("student", "reference")}
        built = Preference(config.preference, student=student, reference=reference, engines=engines, **common)
    else:
        real_score = load(teacher)
        fake_score = copy.deepcopy(real_score) if config.dual_stream.needs_fake_score else None
        if fake_score is not None:
            adapt(fake_score, "critic")
        engines = {name: config.engine_of(name) for name in ("student", "critic", "real_score")}
        built = DualStream.build(
            config.dual_stream,
            student=student,
            real_score=real_score,
            fake_score=fake_score,
            engines=engines,
            **common,
        )
    if config.compile_blocks:  # only now: a copy of a compiled module is not compiled
        for network in built.networks.values():
            getattr(network.module, "transformer", network.module).compile_repeated_blocks()
    return built
