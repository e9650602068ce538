"""Stage III beside its loss computed by hand in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from common.seeding import seeded_noise
from datagen.dataset.loader import Batch
from tests.trainer import toys
from trainer.engine.config import OptimizerConfig
from trainer.engine.process_group import World
from trainer.stages.losses import dpo_loss
from trainer.stages.preference import SPEC, Preference, PreferenceTrainingConfig

KEYS = ["one", "two", "three"]


def pairs() -> Batch:
    z_lr = torch.stack([seeded_noise(toys.LATENT, key, "lr") for key in KEYS])
    shift = {name: torch.stack([seeded_noise(toys.LATENT, key, name) for key in KEYS]) for name in ("w", "l")}
    metadata = [{"caption": "a film", "noise_win": ["toy", key, 0], "noise_lose": ["toy", key, 1]} for key in KEYS]
    return Batch(KEYS, {"z_win": z_lr + 0.1 * shift["w"], "z_lose": z_lr + shift["l"], "z_lr": z_lr}, metadata)


def build(**changes: object) -> Preference:
    values: dict[str, object] = {"beta": 20.0, "anchor_weight": 0.5, "optimizer": OptimizerConfig(learning_rate=1e-3)}
    reference = toys.transformer(4)
    # a student that has moved, or every margin would be zero
    transformers = {"student": toys.moved(reference), "reference": reference}
    return Preference(toys.setup(SPEC, PreferenceTrainingConfig(**(values | changes)), transformers))


@torch.no_grad()
def test_loss_at_one_with_the_candidates_own_noise(world: World) -> None:
    stage, batch = build(), pairs()
    student, reference = (copy.deepcopy(n.module).double() for n in (stage.student, stage.reference))
    dpo, anchor = [], []
    for index, key in enumerate(KEYS):
        error = {}
        for side, name, number in (("w", "z_win", 0), ("l", "z_lose", 1)):
            noise = seeded_noise(toys.LATENT, "toy", key, number).double()[None]
            target = noise - batch.tensors[name][index : index + 1].double()
            inputs = (noise, torch.ones(1), batch.tensors["z_lr"][index : index + 1].double(), toys.embed(["a film"]))
            v, v_ref = student(*inputs).velocity, reference(*inputs).velocity
            error[side] = ((target - v) ** 2).mean().item() - ((target - v_ref) ** 2).mean().item()
            anchor.append(((v - v_ref) ** 2).mean().item())
        dpo.append(math.log(1 + math.exp(20.0 / 2 * (error["w"] - error["l"]))))
    with torch.enable_grad():
        found = stage.train_step(0, [batch])
    assert found["loss_dpo"] == pytest.approx(sum(dpo) / 3, rel=1e-4)
    assert found["loss_anchor"] == pytest.approx(sum(anchor) / 6, rel=1e-4)


def test_loss_of_no_difference_is_log_two() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    assert dpo_loss(zero, zero, zero, zero, 1000.0).item() == pytest.approx(math.log(2))


def test_it_comes_to_prefer_the_winner(world: World) -> None:
    stage, batch = build(), pairs()
    found = [stage.train_step(step, [batch]) for step in range(30)]
    assert found[-1]["margin"] > found[0]["margin"] and found[-1]["preferred"] == 1.0
    assert found[-1]["loss_dpo"] < found[0]["loss_dpo"]


def test_the_reference_never_moves(world: World) -> None:
    stage = build()
    before = [p.detach().clone() for p in stage.reference.module.parameters()]
    stage.train_step(0, [pairs()])
    assert all(torch.equal(a, b) for a, b in zip(before, stage.reference.module.parameters(), strict=True))


def test_anchor_keeps_the_student_near(world: World) -> None:
    distance = {}
    for weight in (0.0, 100.0):
        stage = build(anchor_weight=weight, beta=1000.0)
        distance[weight] = [stage.train_step(step, [pairs()])["loss_anchor"] for step in range(15)][-1]
    assert distance[100.0] < 0.5 * distance[0.0]


def test_random_times_are_a_switch(world: World) -> None:
    stage = build(operating_point="random")
    (z_t, t, _, _), target = stage._pair(0, pairs())
    win, lose = (x.chunk(2) for x in (t, z_t))
    assert torch.equal(win[0], win[1]), "winner and loser are compared at the same t"
    assert (t < 1).all() and not torch.equal(*lose)
    # and with the same noise: v* + z0 = ε
    noise = target + torch.cat([pairs().tensors["z_win"], pairs().tensors["z_lose"]])
    assert torch.allclose(*noise.chunk(2), atol=1e-6)
