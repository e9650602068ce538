"""Stage I, progressive guided distillation: first the guidance, then the steps.

1. CFG distillation: one forward is fitted to the result of guidance's two,
       L = mean‖v_S(z_t, t, z_LR, c) - v_cfg‖²,    v_cfg = v(c) + w·(v(c) - v(∅)).
   Its result is kept as the multi-step teacher: the real score of Stage II.
2. Halvings 64 → 32 → … → 1: from z_t the teacher takes two Euler steps t → t' → t''; the student is fitted to reach the
   same point in one,
       v* = (z_t - z̃_t'') / (t - t'').
   After each halving the teacher becomes the latest student.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field, field_validator
from torch import Tensor

from common.config import Section
from pipeline.flow_matching import q_t, time_grid
from pipeline.model.config import NULL_PROMPT
from pipeline.sampling import guided_velocity, one_step
from trainer.engine.config import OptimizerConfig
from trainer.stages.losses import velocity_loss
from trainer.stages.stage import STUDENT, Meter, NetworkSpec, StageSetup, StageSpec, TrainingStage

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
    #: shift of t; null = model.shift [peer: Wan2.1]
    time_shift: float | None = Field(default=None, gt=0)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, betas=(0.9, 0.999))  # [ours]
    #: decay per update of the exported weights' EMA [ours]
    ema_decay: float = Field(default=0.99, ge=0, lt=1)

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


class Progressive(TrainingStage):
    """Student and teacher, two copies of the base model to begin with."""

    def __init__(self, setup: StageSetup) -> None:
        super().__init__(setup)
        self.student = self.exported = setup.network("student")
        # The teacher has an optimizer that never steps: so it has masters, which are saved, loaded and overwritten
        # shard by shard.
        self.teacher = setup.network("teacher")
        self.networks = {"student": self.student, "teacher": self.teacher}
        self._keep_model = setup.keep_model

    def train_step(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """One update; where a phase ends, the teacher becomes the student.

        The CFG-distilled weights are kept as the model "teacher"; the base's, if there is no CFG distillation.
        """
        if step == 0 and self.config.guidance_iterations == 0 and self._keep_model is not None:
            self._keep_model("teacher", self.teacher.full_state_dict())
            if dist.get_rank() == 0:
                print(
                    "guidance_iterations is 0: the teacher is the base model as it is; "
                    "trainer.dual_stream.real_score_guidance guides it in Stage II",
                    flush=True,
                )
        values = super().train_step(step, batches)
        if self.config.new_teacher_at(step):
            if self.config.student_steps(step) is None and self._keep_model is not None:
                self._keep_model("teacher", self.student.full_state_dict(ema=True))
            self.teacher.copy_weights_from(self.student)
            self.student.restart_optimizer()
        return values

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

    def objective(self, step: int) -> str:
        """The CFG distillation, or the halving in steps."""
        student_steps = self.config.student_steps(step)
        return "guidance" if student_steps is None else f"{2 * student_steps} -> {student_steps} steps"

    @torch.no_grad()
    def _guided(self, s: ProgressiveSample) -> Tensor:
        """v_cfg = v(c) + w·(v(c) - v(∅)) of the teacher."""
        null = self.embedded([NULL_PROMPT] * len(s.t))
        return guided_velocity(self._teacher_velocity, s.z_t, s.t, s.z_lr, s.prompt, null, self.config.guidance_weight)

    @torch.no_grad()
    def _halved(self, s: ProgressiveSample) -> Tensor:
        """v* = (z_t - z̃_t'') / (t - t'') from two Euler steps of the teacher."""
        return two_step_target(self._teacher_velocity, s.z_t, s.t, s.t_middle, s.t_end, s.z_lr, s.prompt)

    def _teacher_velocity(self, z_t: Tensor, t: Tensor, z_lr: Tensor, prompt: Tensor) -> Tensor:
        return self.teacher.frozen(z_t, t, z_lr, prompt).velocity.float()

    def _sample(self, batch: Batch, step: int, student_steps: int | None) -> ProgressiveSample:
        draws, z_hr = self.draws(step, batch), self.latents(batch, "z_hr")
        if student_steps is None:
            t = draws.times("time", shift=self.shift, low=0.0, high=1.0)
            middle = end = t
        else:
            grid = time_grid(2 * student_steps, self.shift).float().to(self._device)
            position = 2 * (draws.uniform("time") * student_steps).long().clamp(max=student_steps - 1)
            t, middle, end = grid[position], grid[position + 1], grid[position + 2]
        return ProgressiveSample(
            z_t=q_t(z_hr, draws.noise("diffusion", z_hr), t),
            t=t,
            t_middle=middle,
            t_end=end,
            z_lr=self.latents(batch, "z_lr"),
            prompt=self.prompts(batch),
        )

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the student."""
        z_lr, prompt = self.latents(batch, "z_lr"), self.prompts(batch)
        noise = self.draws(-1, batch).noise("diffusion", z_lr)
        return {"student": one_step(lambda *inputs: self.student.frozen(*inputs).velocity, noise, z_lr, prompt)}


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


SPEC = StageSpec(
    name="progressive",
    summary="Stage I: progressive guided distillation to one step",
    config=ProgressiveConfig,
    networks=(STUDENT, NetworkSpec("teacher", optimizer="optimizer", moments=False, copies="student", lora="student")),
    build=Progressive,
    init="the base model",
    steps=lambda config: config.steps,
    kept_models=1,  # the teacher
)
