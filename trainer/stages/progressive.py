"""Stage I, progressive guided distillation: first the guidance, then the steps.

1. CFG distillation: one forward learns what guidance needed two for,
       L = mean‖v_S(z_t, t, z_LR, c) - v_cfg‖²,    v_cfg = v(c) + w·(v(c) - v(∅)).
   Its result is kept as the multi-step teacher: the real score of Stage II.
2. Halvings 64 → 32 → … → 1: from z_t the teacher takes two Euler steps t → t' → t''; the student learns to reach the
   same point in one,
       v* = (z_t - z̃_t'') / (t - t'').
   After each halving the teacher becomes the latest student.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from common.config import Section
from pipeline.flow_matching import q_t, time_grid
from pipeline.model.prompts import NULL_PROMPT
from pipeline.model.transformer import VSRTransformer
from pipeline.sampling import guided_velocity, one_step
from trainer.engine.network import DeepSpeedConfig, Network, OptimizerConfig
from trainer.stages.losses import velocity_loss
from trainer.stages.stage import Draws, Meter

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch


class ProgressiveConfig(Section):
    """Numbers of Stage I."""

    #: w of v(c) + w·(v(c) - v(∅)) [peer]
    guidance_weight: float = Field(default=3.0, ge=0)
    #: updates of the CFG distillation [ours]
    guidance_iterations: int = Field(default=2000, ge=0)
    #: the student's steps after each halving; the teacher takes twice as many [note]
    schedule: tuple[int, ...] = (32, 16, 8, 4, 2, 1)
    #: updates per halving [note]
    iterations_per_halving: int = Field(default=500, ge=1)
    time_shift: float = Field(default=5.0, gt=0)  # [peer: Wan2.1]
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, betas=(0.9, 0.999))  # [ours]
    ema_decay: float = Field(default=0.99, ge=0, lt=1)  # [ours]

    @field_validator("schedule")
    @classmethod
    def _halves_down_to_one(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or value[-1] != 1 or any(a != 2 * b for a, b in itertools.pairwise(value)):
            raise ValueError("must halve at every entry and end with 1, for instance 32, 16, 8, 4, 2, 1")
        return value

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.guidance_iterations + len(self.schedule) * self.iterations_per_halving

    def student_steps(self, step: int) -> int | None:
        """Steps of the student being trained at update `step`; None during CFG distillation."""
        if step < self.guidance_iterations:
            return None
        halving = (step - self.guidance_iterations) // self.iterations_per_halving
        return self.schedule[min(halving, len(self.schedule) - 1)]

    def new_teacher_at(self, step: int) -> bool:
        """Whether a phase ends with update `step` (the student then becomes the teacher)."""
        return self.student_steps(step) != self.student_steps(step + 1)


class Progressive:
    """Implements `trainer.stages.stage.Stage`."""

    name = "progressive"
    preview_names: tuple[str, ...] = ("student",)

    def __init__(
        self,
        config: ProgressiveConfig,
        *,
        student: VSRTransformer,
        engines: dict[str, DeepSpeedConfig],
        embed: Callable[[list[str]], Tensor],
        seed: int,
        device: torch.device | str,
        keep_teacher: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> None:
        """
        Args:
            student: the base model; a copy of it is the first teacher.
            engines: how `student` and `teacher` are sharded.
            keep_teacher: called once, on every rank, with the CFG-distilled weights (rank 0 holds them); with the
                base's as they are if there is no CFG distillation.
        """
        self.config = config
        teacher = copy.deepcopy(student)
        self.student = Network(
            "student",
            student,
            deepspeed=engines["student"],
            optimizer=config.optimizer,
            ema_decay=config.ema_decay,
        )
        # The teacher has an optimizer that never steps: it gives the teacher masters, so that it is saved, loaded and
        # overwritten shard by shard like everything else.
        self.teacher = Network("teacher", teacher, deepspeed=engines["teacher"], optimizer=config.optimizer)
        self.networks = {"student": self.student, "teacher": self.teacher}
        self.exported = self.student
        self.batches_per_step = engines["student"].gradient_accumulation
        self._embed, self._seed, self._device = embed, seed, torch.device(device)
        self._keep_teacher = keep_teacher

    def train_step(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """One update; at the end of a phase the teacher becomes the student."""
        if step == 0 and self.config.guidance_iterations == 0 and self._keep_teacher is not None:
            self._keep_teacher(self.teacher.full_state_dict())  # Stage II needs one all the same
        meter = Meter(self._device)
        self.updates(step, batches, meter)
        if self.config.new_teacher_at(step):
            if self.config.student_steps(step) is None and self._keep_teacher is not None:
                self._keep_teacher(self.student.full_state_dict(ema=True))
            self.teacher.copy_weights_from(self.student)
            self.student.restart_optimizer()
        return meter.means()

    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """The student descends the loss of its phase."""
        student_steps = self.config.student_steps(step)
        with self.student.updating():
            for batch in batches:
                s = self._sample(batch, step, student_steps)
                target = self._guided(s) if student_steps is None else self._halved(s)
                loss = velocity_loss(self.student(s.z_t, s.t, s.z_lr, s.prompt).velocity, target)
                self.student.backward(loss)
                meter.add(loss=loss)
            meter.add(gradient_norm_student=self.student.step(), student_steps=float(student_steps or 0))

    def phase(self, step: int) -> bool:
        """Whether it is the CFG distillation; all halvings are alike."""
        return self.config.student_steps(step) is None

    @torch.no_grad()
    def _guided(self, s: ProgressiveSample) -> Tensor:
        """v_cfg = v(c) + w·(v(c) - v(∅)) of the teacher."""
        null = self._embed([NULL_PROMPT] * len(s.t)).to(self._device)
        return guided_velocity(
            self._teacher_velocity, s.z_t, s.t, s.z_lr, s.prompt, null, self.config.guidance_weight
        )

    @torch.no_grad()
    def _halved(self, s: ProgressiveSample) -> Tensor:
        """v* = (z_t - z̃_t'') / (t - t'') from two Euler steps of the teacher."""
        return two_step_target(self._teacher_velocity, s.z_t, s.t, s.t_middle, s.t_end, s.z_lr, s.prompt)

    def _teacher_velocity(self, z_t: Tensor, t: Tensor, z_lr: Tensor, prompt: Tensor) -> Tensor:
        return self.teacher.frozen(z_t, t, z_lr, prompt).velocity.float()

    def _sample(self, batch: Batch, step: int, student_steps: int | None) -> ProgressiveSample:
        draws = Draws(batch.keys, self._seed, self.name, step, 0, device=self._device)
        z_hr = batch.tensors["z_hr"].to(self._device, torch.float32)
        if student_steps is None:
            t = draws.times("time", shift=self.config.time_shift, low=0.0, high=1.0)
            middle = end = t
        else:
            grid = time_grid(2 * student_steps, self.config.time_shift).float().to(self._device)
            position = 2 * (draws.uniform("time") * student_steps).long().clamp(max=student_steps - 1)
            t, middle, end = grid[position], grid[position + 1], grid[position + 2]
        return ProgressiveSample(
            z_t=q_t(z_hr, draws.noise("diffusion", z_hr), t),
            t=t,
            t_middle=middle,
            t_end=end,
            z_lr=batch.tensors["z_lr"].to(self._device, torch.float32),
            prompt=self._embed([entry["caption"] for entry in batch.metadata]).to(self._device),
        )

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the student."""
        draws = Draws(batch.keys, self._seed, self.name, -1, 0, device=self._device)
        z_lr = batch.tensors["z_lr"].to(self._device, torch.float32)
        prompt = self._embed([entry["caption"] for entry in batch.metadata]).to(self._device)
        noise = draws.noise("diffusion", z_lr)
        return {
            "student": one_step(lambda *inputs: self.student.frozen(*inputs).velocity, noise, z_lr, prompt)
        }

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the phase is a function of the step, and the teacher is one of the networks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class ProgressiveSample(NamedTuple):
    """What one micro-batch needs: z_t, the times t > t' > t'', z_LR and the prompt."""

    z_t: Tensor
    t: Tensor
    t_middle: Tensor
    t_end: Tensor
    z_lr: Tensor
    prompt: Tensor


def two_step_target(
    teacher: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    z_t: Tensor,
    t: Tensor,
    t_middle: Tensor,
    t_end: Tensor,
    z_lr: Tensor,
    prompt: Tensor,
) -> Tensor:
    """v* = (z_t - z̃_t'') / (t - t''), z̃ from two Euler steps t → t' → t'' of `teacher`; times (B,)."""

    def column(x: Tensor) -> Tensor:
        return x.reshape(-1, *([1] * (z_t.ndim - 1)))

    z = z_t + column(t_middle - t) * teacher(z_t, t, z_lr, prompt)
    z = z + column(t_end - t_middle) * teacher(z, t_middle, z_lr, prompt)
    return (z_t - z) / column(t - t_end)
