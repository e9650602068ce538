"""Stage I beside its equations computed by hand in float64, and its schedule of teachers."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.flow_matching import time_grid
from tests.trainer import toys
from trainer.engine.config import OptimizerConfig
from trainer.engine.process_group import World
from trainer.stages.progressive import SPEC, Progressive, ProgressiveConfig, two_step_target

CONFIG = ProgressiveConfig(
    guidance_weight=3.0,
    guidance_iterations=2,
    schedule=(4, 2, 1),
    iterations_per_halving=2,
    optimizer=OptimizerConfig(learning_rate=1e-3),
    time_shift=5.0,
)
KEYS = [f"clip-{index}" for index in range(4)]


def build(kept: list[dict[str, Tensor]] | None = None, config: ProgressiveConfig = CONFIG) -> Progressive:
    keep = None if kept is None else lambda name, state: kept.append(state)
    return Progressive(toys.setup(SPEC, config, {"student": toys.transformer(4)}, keep_model=keep))


def wide(stage: Progressive) -> tuple[nn.Module, nn.Module]:
    return tuple(copy.deepcopy(n.module).double() for n in (stage.student, stage.teacher))  # type: ignore[return-value]


def weights(network: object) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in network.module.parameters()])  # type: ignore[attr-defined]


@torch.no_grad()
def test_cfg_distillation_loss(world: World) -> None:
    stage, batch = build(), toys.batch(KEYS)
    s = stage._sample(batch, 0, None)
    student, teacher = wide(stage)
    z_t, t, z_lr, c = (x.double() for x in (s.z_t, s.t, s.z_lr, s.prompt))
    null = toys.embed([""] * len(KEYS)).double()
    # (1 + w)·v(c) - w·v(∅)
    target = 4.0 * teacher(z_t, t, z_lr, c).velocity - 3.0 * teacher(z_t, t, z_lr, null).velocity
    expected = (student(z_t, t, z_lr, c).velocity - target).pow(2).mean().item()
    with torch.enable_grad():
        assert stage.train_step(0, [batch])["loss"] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_halving_loss(world: World) -> None:
    stage, batch = build(), toys.batch(KEYS)
    student, teacher = wide(stage)
    s = stage._sample(batch, 3, 4)
    grid = time_grid(8, CONFIG.time_shift)
    losses = []
    for index in range(len(KEYS)):
        z, z_lr, c = (
            s.z_t[index : index + 1].double(),
            s.z_lr[index : index + 1].double(),
            s.prompt[index : index + 1],
        )
        start = int((grid - float(s.t[index])).abs().argmin())
        assert start % 2 == 0, "the student starts at points of its own, coarser grid"
        t = s.t[index : index + 1].double()
        t1, t2 = s.t_middle[index : index + 1].double(), s.t_end[index : index + 1].double()
        assert (t1.item(), t2.item()) == pytest.approx((grid[start + 1].item(), grid[start + 2].item()), abs=1e-6)
        half = z - (t - t1) * teacher(z, t, z_lr, c.double()).velocity
        whole = half - (t1 - t2) * teacher(half, t1, z_lr, c.double()).velocity
        v = student(z, t, z_lr, c.double()).velocity
        losses.append((v - (z - whole) / (t - t2)).pow(2).mean().item())
    with torch.enable_grad():
        found = stage.train_step(3, [batch])
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found["student_steps"] == 4


def test_one_step_along_the_target_is_two_of_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 2, 1, 2, 2, dtype=torch.float64, generator=generator)
    t, t1, t2 = (torch.full((3,), value, dtype=torch.float64) for value in (0.9, 0.7, 0.4))

    def teacher(z: Tensor, t: Tensor, z_lr: Tensor, prompt: Tensor) -> Tensor:
        return torch.sin(z) * t.view(-1, 1, 1, 1, 1)

    target = two_step_target(teacher, z, t, t1, t2, z, z)
    half = z - 0.2 * torch.sin(z) * 0.9
    assert torch.allclose(z - 0.5 * target, half - 0.3 * torch.sin(half) * 0.7, atol=1e-12)


def test_teachers_follow_the_schedule(world: World) -> None:
    kept: list[dict[str, Tensor]] = []
    stage = build(kept)
    teachers = [weights(stage.teacher)]
    steps = []
    for step in range(CONFIG.steps):
        steps.append(stage.train_step(step, [toys.batch(KEYS)])["student_steps"])
        teachers.append(weights(stage.teacher))
        changed = not torch.equal(teachers[-1], teachers[-2])
        assert changed == (step in (1, 3, 5)), step
        if changed:
            assert torch.equal(teachers[-1], weights(stage.student)), "the teacher is the latest student"
    assert steps == [0, 0, 4, 4, 2, 2, 1, 1]
    assert len(kept) == 1, "the CFG-distilled teacher is kept once"


def test_without_cfg_distillation_the_base_is_the_teacher(world: World) -> None:
    kept: list[dict[str, Tensor]] = []
    stage = build(kept, CONFIG.model_copy(update={"guidance_iterations": 0}))
    base = stage.student.full_state_dict()
    for step in range(3):
        assert stage.train_step(step, [toys.batch(KEYS)])["student_steps"] > 0
    (teacher,) = kept
    assert teacher.keys() == base.keys() and all(torch.equal(teacher[name], base[name]) for name in base)


def test_the_last_student_starts_at_pure_noise(world: World) -> None:
    s = build()._sample(toys.batch(KEYS), 7, 1)
    assert s.t.tolist() == [1.0] * len(KEYS) and s.t_end.tolist() == [0.0] * len(KEYS)


@pytest.mark.parametrize("schedule", [(), (4, 2), (8, 2, 1), (3, 1)])
def test_a_schedule_must_halve_down_to_one(schedule: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="must halve"):
        ProgressiveConfig(schedule=schedule)
