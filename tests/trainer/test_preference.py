"""Stage III beside its loss computed by hand in float64."""

from __future__ import annotations

import copy
import math
from statistics import mean, stdev

import pytest
import torch

from common.seeding import seeded_noise
from datagen.dataset.loader import Batch
from pipeline.sampling import one_step
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
@pytest.mark.parametrize("point", ["one_step", "candidate_noise"])
def test_loss_at_one_by_hand(world: World, point: str) -> None:
    stage, batch = build(operating_point=point), pairs()
    student, reference = (copy.deepcopy(n.module).double() for n in (stage.student, stage.reference))
    fresh = stage.draws(0, batch).noise("diffusion", batch.tensors["z_win"])
    dpo, anchor, change = [], [], {"w": 0.0, "l": 0.0}
    for index, key in enumerate(KEYS):
        error = {}
        for side, name, number in (("w", "z_win", 0), ("l", "z_lose", 1)):
            own = seeded_noise(toys.LATENT, "toy", key, number)[None]
            noise = (own if point == "candidate_noise" else fresh[index : index + 1]).double()
            target = noise - batch.tensors[name][index : index + 1].double()
            inputs = (noise, torch.ones(1), batch.tensors["z_lr"][index : index + 1].double(), toys.embed(["a film"]))
            v, v_ref = student(*inputs).velocity, reference(*inputs).velocity
            error[side] = ((target - v) ** 2).mean().item() - ((target - v_ref) ** 2).mean().item()
            change[side] += error[side] / 3
            anchor.append(((v - v_ref) ** 2).mean().item())
        dpo.append(math.log(1 + math.exp(20.0 / 2 * (error["w"] - error["l"]))))
    with torch.enable_grad():
        found = stage.train_step(0, [batch])
    assert found["loss_dpo"] == pytest.approx(sum(dpo) / 3, rel=1e-4)
    assert found["loss_anchor"] == pytest.approx(sum(anchor) / 6, rel=1e-4)
    assert found["winner_error_change"] == pytest.approx(change["w"], rel=1e-3)
    assert found["loser_error_change"] == pytest.approx(change["l"], rel=1e-3)


def linear_score(z0: torch.Tensor) -> torch.Tensor:
    """A judge with a strong preference: the projection on a fixed direction, (B,)."""
    return (z0 * seeded_noise(toys.LATENT, "direction")).flatten(1).mean(1)


def gain(seed: int, point: str, *, swapped: bool) -> float:
    """Change of the mean score on noise and clips not trained on, in deviations of the reference's score.

    Pairs are made as preference.build makes them: five candidates of the reference itself, best and worst, stored in
    bfloat16.
    """
    reference, prompt = toys.transformer(10 + seed), toys.embed(["a film"])

    def outputs(model: torch.nn.Module, noise: torch.Tensor, z_lr: torch.Tensor) -> torch.Tensor:
        return one_step(lambda *x: model(*x).velocity, noise, z_lr, prompt.repeat(len(noise), 1, 1))

    batches = []
    for first in range(0, 64, 16):
        keys = [f"{seed}-{index}" for index in range(first, first + 16)]
        z_lr = torch.stack([seeded_noise(toys.LATENT, key, "lr") for key in keys])
        chosen, metadata = [], []
        for key, lr in zip(keys, z_lr, strict=True):
            noise = torch.stack([seeded_noise(toys.LATENT, key, number) for number in range(5)])
            with torch.no_grad():
                candidates = outputs(reference, noise, lr.repeat(5, 1, 1, 1, 1))
            order = linear_score(candidates).argsort(descending=not swapped).tolist()
            chosen.append(candidates[[order[0], order[-1]]].bfloat16().float())
            metadata.append({"caption": "a film", "noise_win": [key, order[0]], "noise_lose": [key, order[-1]]})
        win, lose = torch.stack(chosen).unbind(1)
        batches.append(Batch(keys, {"z_win": win, "z_lose": lose, "z_lr": z_lr}, metadata))

    config = PreferenceTrainingConfig(operating_point=point, optimizer=OptimizerConfig(learning_rate=1e-4))
    transformers = {"student": copy.deepcopy(reference), "reference": copy.deepcopy(reference)}
    stage = Preference(toys.setup(SPEC, config, transformers, seed=seed))
    for step in range(24):
        stage.train_step(step, [batches[step % len(batches)]])
    noise, z_lr = (torch.stack([seeded_noise(toys.LATENT, name, seed, n) for n in range(64)]) for name in ("n", "z"))
    with torch.no_grad():
        before, after = (linear_score(outputs(m, noise, z_lr)) for m in (reference, stage.student.module))
    return ((after - before).mean() / before.std()).item()


def learns_preferences(point: str) -> bool:
    """Right labels raise the mean score and swapped ones lower it, both beyond the spread of three seeds."""
    gains = {swapped: [gain(seed, point, swapped=swapped) for seed in range(3)] for swapped in (False, True)}
    print(point, gains)
    return mean(gains[False]) > stdev(gains[False]) and mean(gains[True]) < -stdev(gains[True])


@pytest.mark.parametrize("point", ["one_step", "random"])
def test_right_labels_raise_the_score_and_swapped_ones_lower_it(world: World, point: str) -> None:
    assert learns_preferences(point)


def test_the_candidates_own_noise_teaches_no_preference(world: World) -> None:
    assert not learns_preferences("candidate_noise")


def test_no_checkpoint_is_the_best_by_psnr_against_the_winner() -> None:
    assert SPEC.schedule.keep_best is None


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
