"""The memory formulas beside the bytes of all live tensors (benchmarks/memory.py counts them)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory as measured
from pipeline.model.config import ModelConfig
from tests.trainer.ranks import run_on_ranks
from trainer.engine.config import DeepSpeedConfig
from trainer.engine.frozen_linear import linear
from trainer.engine.process_group import World
from trainer.planning.memory import GIB, block_bytes, network_memory
from trainer.stages import STAGES

LATENT = (1, 32, 32)
TOKENS = 256


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(("heads", "ffn_dim"), [(2, 768), (4, 512)])
@pytest.mark.parametrize("zero_3", [False, True])
def test_what_a_block_holds(
    precision: str, trainable: bool, heads: int, ffn_dim: int, zero_3: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if zero_3:
        monkeypatch.setattr(torch.nn.functional, "linear", linear)
    shape = measured.SMALL.model_copy(update={"num_attention_heads": heads, "ffn_dim": ffn_dim})
    held = measured.held_by_a_block(shape, LATENT, precision, trainable=trainable, checkpointing=False)
    formula = TOKENS * block_bytes(64 * heads, ffn_dim, precision, trainable=trainable)
    assert held == pytest.approx(formula, rel=0.02)


def test_what_a_checkpointed_block_holds() -> None:
    held = measured.held_by_a_block(measured.SMALL, LATENT, "bf16", trainable=True, checkpointing=True)
    assert held == TOKENS * 2 * 128


def _formula(zero_stage: int, precision: str, ranks: int) -> tuple[float, float]:
    engine = DeepSpeedConfig(zero_stage=zero_stage, precision=precision)  # type: ignore[arg-type]
    memory = network_memory(1_000_000, engine, ranks, trained=True, ema=True)
    return memory.total * GIB / 1e6, (memory.total + memory.passing) * GIB / 1e6


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_what_a_network_holds(zero_stage: int, precision: str, world: World) -> None:
    found = measured.network_bytes(zero_stage, precision)
    always, peak = _formula(zero_stage, precision, 1)
    assert found["always"] == pytest.approx(always, rel=0.01)
    assert found["peak"] == pytest.approx(peak, rel=0.02)


def on_ranks(world: World, *, precision: str) -> dict[str, Any]:
    return {str(stage): measured.network_bytes(stage, precision) for stage in (1, 2, 3)}


@pytest.mark.distributed
def test_what_a_network_holds_on_two_ranks() -> None:
    for found in run_on_ranks(f"{__name__}:on_ranks", 2, precision="bf16"):
        for stage in (1, 2, 3):
            assert found[str(stage)]["always"] == pytest.approx(_formula(stage, "bf16", 2)[0], rel=0.01)


@pytest.mark.parametrize(
    ("stage", "zero_stage", "checkpointing"),
    [("base", 2, True), ("dual_stream", 2, False), ("dual_stream", 2, True), ("dual_stream", 3, False)],
)
def test_the_peak_of_a_step(stage: Any, zero_stage: int, checkpointing: bool, world: World) -> None:
    """Of all networks, graphs, features and heads that are alive at once."""
    latent = (2, 48, 48)
    model = ModelConfig(transformer=measured.SMALL, vae=Path("none"), prompts=Path("none"))
    config = measured.small_configuration(zero_stage, checkpointing)
    spec = STAGES[stage]
    always, peak = measured.stage_bytes(spec, model, config, world, latent, 1)
    formula = measured.predicted(spec, model, config, 1, latent, 1)
    assert always == pytest.approx(formula.static, rel=0.06)
    assert peak - always == pytest.approx(formula.peak - formula.static, rel=0.1)
