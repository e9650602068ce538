"""Stage III beside its loss computed by hand in float64."""

from __future__ import annotations

import copy
import math
from statistics import mean, stdev

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from pydantic import ValidationError

from common.seeding import seeded_noise
from datagen.dataset.loader import Batch
from pipeline.sampling import one_step
from tests.trainer import toys
from trainer.engine.config import OptimizerConfig
from trainer.engine.process_group import World
from trainer.stages.losses import dpo_loss
from trainer.stages.preference import SPEC, Preference, PreferenceTrainingConfig
from trainer.stages.random_draws import Draws

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


def test_swapped_labels_are_the_pair_turned_round(world: World) -> None:
    """The ablation on a pair does what the default does on the pair with its sides exchanged."""
    z_w, z_l, z_lr = (seeded_noise((2, *toys.LATENT), name) for name in ("w", "l", "lr"))
    metadata = [{"caption": "a film"}] * 2
    losses = []
    for swapped, (win, lose) in ((True, (z_w, z_l)), (False, (z_l, z_w))):
        transformers = {name: toys.transformer(number) for number, name in enumerate(("student", "reference"))}
        config = PreferenceTrainingConfig(swap_labels=swapped)
        stage = Preference(toys.setup(SPEC, config, transformers, seed=0))
        batch = Batch(["a", "b"], {"z_win": win, "z_lose": lose, "z_lr": z_lr}, metadata)
        losses.append(stage.train_step(0, [batch])["loss_dpo"])
    assert losses[0] == losses[1] != pytest.approx(0.6931, abs=1e-3)


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
    stage, batch = build(operating_point="random"), pairs()
    pair = stage._pair(0, batch)
    z_t, t = pair.inputs[:2]
    win, lose = (x.chunk(2) for x in (t, z_t))
    assert torch.equal(win[0], win[1]), "winner and loser are compared at the same t"
    assert (t < 1).all() and not torch.equal(*lose)
    # and with the same noise: v* + z0 = ε
    noises = pair.target_w + batch.tensors["z_win"], pair.target_l + batch.tensors["z_lose"]
    assert torch.allclose(*noises, atol=1e-6)


def test_dmd_beside_the_loss_is_that_of_one_graph(world: World) -> None:
    reference, real = toys.transformer(4), toys.transformer(1)
    transformers = {"student": toys.moved(reference), "reference": reference, "fake_score": toys.moved(real)}
    config = PreferenceTrainingConfig(
        beta=20.0, dmd_weight=0.7, anchor_weight=0.0, auxiliary_updates=1, time_shift=5.0, ema_decay=0.9
    )
    stage = Preference(toys.setup(SPEC, config, transformers | {"real_score": real}))
    batches = [pairs(), pairs()]
    student, plain_reference, fake, plain_real = (
        copy.deepcopy(network.module).double() for network in stage.networks.values()
    )
    z_lr, prompt = batches[0].tensors["z_lr"].double(), toys.embed(["a film"] * 3)

    def q(draws: Draws, z0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t = draws.times("dmd_time", shift=5.0, low=0.02, high=0.98).double()
        noise, wide = draws.noise("dmd", z_lr).double(), t.view(-1, 1, 1, 1, 1)
        return (1 - wide) * z0 + wide * noise, t, noise

    def sample(noise: torch.Tensor) -> torch.Tensor:
        return noise - student(noise, torch.ones(3), z_lr, prompt).velocity

    first = stage.draws(0, batches[0], 0)
    with torch.no_grad():
        z0 = sample(first.noise("generator", z_lr).double())
        z_t, t, noise = q(first, z0)
        diffusion = ((fake(z_t, t, z_lr, prompt).velocity - (noise - z0)) ** 2).mean().item()
    gradients: dict[str, torch.Tensor] = {}
    step = stage.student.step

    def read_then_step() -> float:
        for name, parameter in stage.student.module.named_parameters():
            gradients[name] = safe_get_full_grad(parameter).double().clone()
        return step()

    stage.student.step = read_then_step  # type: ignore[method-assign]
    found = stage.train_step(0, batches)
    assert found["loss_diffusion"] == pytest.approx(diffusion, rel=1e-4)

    fake = copy.deepcopy(stage.fake_score.module).double().requires_grad_(False)  # the fake score has been updated
    draws = stage.draws(0, batches[1], 1)
    student.requires_grad_(True)
    eps = stage.draws(0, batches[1]).noise("diffusion", z_lr).double()
    v = student(eps, torch.ones(3), z_lr, prompt).velocity
    z0 = eps - v
    with torch.no_grad():
        z_t, t, _ = q(draws, z0)
        wide = t.view(-1, 1, 1, 1, 1)
        real_z0, fake_z0 = (z_t - wide * m(z_t, t, z_lr, prompt).velocity for m in (plain_real, fake))
        scale = (z0 - real_z0).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
        target = z0 - (fake_z0 - real_z0) / scale
        v_ref = plain_reference(eps, torch.ones(3), z_lr, prompt).velocity
    dmd = ((z0 - target) ** 2).mean() / 2
    win, lose = (eps - batches[1].tensors[name].double() for name in ("z_win", "z_lose"))
    change = [((y - v) ** 2 - (y - v_ref) ** 2).flatten(1).mean(1) for y in (win, lose)]
    loss = torch.log(1 + torch.exp(10.0 * (change[0] - change[1]))).mean() + 0.7 * dmd
    loss.backward()
    assert found["loss_dmd"] == pytest.approx(dmd.item(), rel=1e-4)
    expected = {name: p.grad if p.grad is not None else 0 * p for name, p in student.named_parameters()}
    error = sum((gradients[name] - expected[name]).square().sum() for name in expected)
    assert (error / sum(value.square().sum() for value in expected.values())).sqrt() < 1e-4


def test_dmd_needs_the_students_operating_point_and_a_teacher() -> None:
    with pytest.raises(ValidationError, match="one_step"):
        PreferenceTrainingConfig(dmd_weight=1.0, operating_point="random")
    assert [SPEC.takes_teacher(PreferenceTrainingConfig(dmd_weight=weight)) for weight in (0.0, 1.0)] == [False, True]


def test_previews_are_those_of_student_and_reference_with_dmd_too(world: World) -> None:
    reference = toys.transformer(4)
    config = PreferenceTrainingConfig(dmd_weight=1.0)
    stage = Preference(toys.setup(SPEC, config, {"student": toys.moved(reference), "reference": reference}))
    assert tuple(stage.previews(pairs())) == ("student", "reference")
