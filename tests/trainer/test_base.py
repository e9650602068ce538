"""The base stage beside flow matching computed by hand in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from tests.trainer import toys
from trainer.engine.config import OptimizerConfig
from trainer.engine.process_group import World
from trainer.stages.base import SPEC, Base, BaseConfig
from trainer.stages.random_draws import Draws

KEYS = [f"clip-{index}" for index in range(64)]


def build(**changes: object) -> Base:
    values: dict[str, object] = {"optimizer": OptimizerConfig(learning_rate=1e-3), "ema_decay": 0.9}
    return Base(toys.setup(SPEC, BaseConfig(**(values | changes)), {"student": toys.transformer(4)}))


def test_loss_is_the_velocity_error(world: World) -> None:
    stage, batch = build(), toys.batch(KEYS[:4])
    network = copy.deepcopy(stage.student.module).double()
    z_t, t, z_lr, prompt, _ = stage.draw(0, batch)
    with torch.no_grad():
        v = network(*(x.double() for x in (z_t, t, z_lr, prompt))).velocity
    # z_t = (1 - t)·z0 + t·ε gives ε - z0 = (z_t - z0) / t, without asking for the noise.
    target = (z_t.double() - batch.tensors["z_hr"].double()) / t.double().view(-1, 1, 1, 1, 1)
    expected = (v - target).pow(2).mean().item()
    assert stage.train_step(0, [batch])["loss"] == pytest.approx(expected, rel=1e-4)


def test_z_lr_is_noised_between_200_and_600_of_1000(world: World) -> None:
    stage, batch = build(), toys.batch(KEYS)
    clean = batch.tensors["z_lr"]
    noised = stage.draw(0, batch)[2]
    # Per sample, q_t makes (1 - l)·z + l·ε: the part along z tells the level l.
    along = (noised * clean).flatten(1).sum(1) / clean.square().flatten(1).sum(1)
    levels = 1 - along
    assert 0.35 < levels.mean() < 0.45
    assert levels.min() > 0.1 and levels.max() < 0.7
    assert torch.equal(build(low_resolution_noise=None).draw(0, batch)[2], clean)


def test_a_tenth_of_the_prompts_is_null(world: World) -> None:
    stage = build(null_prompt_probability=0.1)
    null = toys.embed([""])[0]
    dropped = [bool((row == null).all()) for step in range(10) for row in stage.draw(step, toys.batch(KEYS))[3]]
    assert 0.06 < sum(dropped) / len(dropped) < 0.14


def test_pure_noise_fraction_puts_samples_at_one(world: World) -> None:
    share = torch.cat([build(pure_noise_fraction=0.5).draw(step, toys.batch(KEYS))[1] == 1 for step in range(4)])
    assert 0.4 < share.float().mean() < 0.6


def test_draws_belong_to_the_sample_and_the_step(world: World) -> None:
    stage = build()
    alone, together = stage.draw(3, toys.batch(KEYS[1:2])), stage.draw(3, toys.batch(KEYS[:3]))
    assert torch.equal(alone[0][0], together[0][1])
    assert not torch.equal(alone[0], stage.draw(4, toys.batch(KEYS[1:2]))[0])


def test_it_learns(world: World) -> None:
    stage, batch = build(), toys.batch(KEYS[:8])
    losses = [stage.train_step(0, [batch])["loss"] for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("steps", [(600, 200), (-1, 5), (0, 1001)])
def test_a_wrong_noise_range_is_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="low <= high"):
        BaseConfig(low_resolution_noise=steps)


def test_times_are_clamped_and_shifted_towards_noise() -> None:
    t = Draws([str(index) for index in range(4000)], 0).times("time", shift=5.0, low=0.02, high=0.98)
    assert t.min() >= 0.02 and t.max() <= 0.98
    # U(0, 1) shifted by s has median s/(1 + s).
    assert abs(t.median() - 5 / 6) < 0.02
