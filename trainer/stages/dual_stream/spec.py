"""Stage II's `SPEC`: apart from the package's `__init__`, which its other modules are imported through."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.stages.dual_stream.activations import activation_bytes
from trainer.stages.dual_stream.config import DualStreamConfig
from trainer.stages.stage import NetworkSpec, ScheduleConfig, StageSetup, StageSpec, TrainingStage


def _build(setup: StageSetup) -> TrainingStage:
    from trainer.stages.dual_stream.algorithm import DualStream

    return DualStream(setup)


def _assemble(config: Any, transformers: dict[str, nn.Module], shape: Any, seed: int) -> dict[str, nn.Module]:
    from trainer.stages.dual_stream.auxiliary_networks import assemble_critic

    return assemble_critic(config, transformers, shape, seed)


SPEC = StageSpec(
    name="dual_stream",
    summary="Stage II: dual-stream distillation (DMD + RFS-GAN)",
    config=DualStreamConfig,
    networks=(
        NetworkSpec("student", optimizer="student", ema=True, lora="student", trains_predictor=True),
        NetworkSpec("critic", weights="teacher", optimizer="fake_score", lora="critic", needed="needs_fake_score"),
        NetworkSpec("real_score", weights="teacher"),
    ),
    build=_build,
    schedule=ScheduleConfig(steps=5_000),  # [ours]
    init="the Stage-I student",
    teacher="Stage I's teacher folder: the real score, and the fake score's first weights",
    assemble=_assemble,
    activation_bytes=activation_bytes,
)
