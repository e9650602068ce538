"""Ranks that share a clip compute what one would: outputs, gradients, weights, and a run that one rank goes on with.

tests/trainer/test_parity.py has the rounds of Stage II on two ranks.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError
from common.seeding import seeded_noise
from pipeline.model.low_resolution_skip import LowResolutionPredictor
from pipeline.model.sequence_parallel import ALONE, SequenceGroup, form_sequence_groups
from pipeline.model.transformer import VSRTransformer
from tests.trainer import scenarios, toys
from tests.trainer.presets import losses, run_command, write_preset
from tests.trainer.ranks import run_on_ranks
from tests.trainer.stages import make_run
from trainer.engine.config import DeepSpeedConfig, OptimizerConfig
from trainer.engine.process_group import World
from trainer.loop import train_loop
from trainer.preemption import EXIT_SAVED_ON_SIGNAL
from trainer.stages.base import SPEC, Base, BaseConfig

#: 12 tokens, which 2 and 4 ranks divide; 9, of which the fourth of 4 ranks gets none
LATENTS = (toys.LATENT, (4, 3, 2, 6))
#: ranks that share a clip, of four
SIZES = (2, 4)
BASE = {"zero_stage": 3, "activation_checkpointing": True}
STAGE_2 = {"zero_stage": 2}


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[str, Any]]:
    return run_on_ranks("tests.trainer.test_sequence_parallel:all_of_it", 4)


@pytest.mark.distributed
@pytest.mark.parametrize("latent", LATENTS, ids=["12 tokens", "9 tokens"])
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_are_those_of_one_rank(
    size: int, latent: tuple[int, ...], four_ranks: list[dict[str, Any]]
) -> None:
    for rank, result in enumerate(four_ranks):
        for name, error in result[f"{size} {latent}"].items():
            assert error < 1e-6, (rank, name)


@pytest.mark.distributed
def test_the_base_stage_at_zero_3(world: World, four_ranks: list[dict[str, Any]]) -> None:
    _same_training(base_steps(world, **BASE), four_ranks[0]["base"])


@pytest.mark.distributed
def test_stage_2_at_zero_2(world: World, four_ranks: list[dict[str, Any]]) -> None:
    expected = scenarios.rounds(world, count=3, engine=STAGE_2)
    _same_training(expected, four_ranks[0]["dual_stream"])


def _same_training(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for mine, theirs in zip(found["logs"], expected["logs"], strict=True):
        for name in mine:
            if name.startswith(("loss", "gradient_norm")):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    for network in expected.keys() & {"student", "ema", "critic"}:
        for name, weight in expected[network].items():
            torch.testing.assert_close(found[network][name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.distributed
def test_one_rank_goes_on_with_what_two_began(tmp_path: Path, world: World) -> None:
    preset = write_preset(tmp_path)
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    line = ["--config", preset, "--stage", "base", "--data", tmp_path / "clips", "--output", shared]
    begun = run_command(*line, "--set", "trainer.sequence_parallel=2", "--stop-after", 3, ranks=2)
    assert begun.returncode == EXIT_SAVED_ON_SIGNAL, begun.stderr
    for output in (shared, alone):
        assert train_loop(make_run(preset, "base", output, world))
    for mine, theirs in zip(losses(shared), losses(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_alone_nothing_is_touched() -> None:
    x = torch.zeros(1, 3, 2, requires_grad=True)
    assert ALONE.enter(x) is ALONE.share(x) is ALONE.gather_tokens(x, 3) is x
    assert form_sequence_groups(1) is ALONE


def test_ranks_must_divide_into_groups(world: World) -> None:
    with pytest.raises(UserError, match="sequence_parallel = 2 does not divide the 1 ranks"):
        form_sequence_groups(2)


def test_heads_must_divide_among_ranks() -> None:
    with pytest.raises(UserError, match="does not divide the model's 4 attention heads; use one of 1, 2, 4"):
        toys.transformer(1).share_sequence(SequenceGroup(size=3))


# --- what the four ranks do -------------------------------------------------------------------------------------


def all_of_it(world: World) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for size in SIZES:
        group = form_sequence_groups(size)
        for latent in LATENTS:
            results[f"{size} {latent}"] = errors(world, group, latent)
    results["base"] = base_steps(world, sequence_parallel=2, **BASE)
    results["dual_stream"] = scenarios.rounds(world, count=3, engine=STAGE_2, sequence_parallel=2)
    return results


def errors(world: World, group: SequenceGroup, latent: tuple[int, ...]) -> dict[str, float]:
    """Relative errors of outputs and gradients against the same network alone, each group on a clip of its own."""
    alone = toys.transformer(5)
    alone.register_to_config(low_resolution_skip=True, low_resolution_predictor=True)
    alone.predictor = LowResolutionPredictor(toys.LATENT[0], 0.5)
    torch.nn.init.normal_(alone.predictor.filter.weight, std=0.1)
    alone = alone.double()
    shared = copy.deepcopy(alone)
    shared.share_sequence(group)
    found: dict[str, float] = {}
    ways = ["plain", "checkpointing"] + ["compiled"] * (group.size == 2 and latent == toys.LATENT)
    for way in ways:
        if way == "checkpointing":
            shared.enable_gradient_checkpointing()
        if way == "compiled":
            shared.disable_gradient_checkpointing()
            shared.blocks[1].compile(backend="aot_eager")  # one is enough, and no C++ compiler is needed
        expected = _pass(alone, latent, world.rank // group.size)
        for name, value in _pass(shared, latent, world.rank // group.size).items():
            if name.startswith("parameter"):
                dist.all_reduce(value, group=group.group)
                value /= group.size
            scale = expected[name].norm().clamp_min(1e-9)
            found[f"{name}, {way}"] = float((value - expected[name]).norm() / scale)
    return found


def _pass(model: VSRTransformer, latent: tuple[int, ...], clip: int) -> dict[str, Tensor]:
    """Outputs of a full and of a features-only pass, and all gradients of a loss on both."""
    inputs = {
        "z_t": seeded_noise((2, *latent), "z_t", clip),
        "t": torch.tensor([0.3, 0.8]),
        "z_lr": seeded_noise((2, *latent), "z_lr", clip),
        "prompt": seeded_noise((2, 4, 8), "prompt", clip),
    }
    leaves = {name: value.double().requires_grad_() for name, value in inputs.items()}
    full = model(**leaves, feature_layers=(1, 3))
    only = model(**leaves, feature_layers=(2,), features_only=True)
    outputs = dict(enumerate((full.velocity, *full.features, *only.features)))
    loss = sum((out * seeded_noise(out.shape, "weight", i).double()).mean() for i, out in outputs.items())
    parameters = {f"parameter {name}": parameter for name, parameter in model.named_parameters()}
    wanted = leaves | parameters
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return {f"output {i}": out.detach() for i, out in outputs.items()} | dict(zip(wanted, gradients, strict=True))


def base_steps(world: World, *, sequence_parallel: int = 1, **engine: Any) -> dict[str, Any]:
    """Three updates of the base stage on global batches of four."""
    group = form_sequence_groups(sequence_parallel)
    config = BaseConfig(optimizer=OptimizerConfig(learning_rate=1e-3), ema_decay=0.9)
    settings = DeepSpeedConfig(precision="fp32", persistence_threshold=0, **engine)
    stage = Base(toys.setup(SPEC, config, {"student": toys.transformer(4)}, engine=settings, sequence=group))
    reader, readers = world.rank // group.size, world.size // group.size
    logs = [
        stage.train_step(step, toys.local_batches(toys.global_batches(step, 1, 4), reader, readers, 1))
        for step in range(3)
    ]
    return {"logs": logs, "student": stage.student.full_state_dict(), "ema": stage.student.full_state_dict(ema=True)}
