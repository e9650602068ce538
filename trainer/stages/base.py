"""The multi-step base model: flow matching on (z_LR, z_HR) pairs.

z_t = (1 - t)·z0 + t·ε,    v = ε - z0,    L = mean‖v_θ(z_t, t, z_LR, c) - v‖²
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field, field_validator
from torch import Tensor

from common.config import Section
from pipeline.flow_matching import q_t, velocity, x0_from_velocity
from pipeline.model.config import NULL_PROMPT
from trainer.engine.config import OptimizerConfig
from trainer.stages.losses import velocity_loss
from trainer.stages.random_draws import Draws
from trainer.stages.stage import STUDENT, Meter, ScheduleConfig, StageSetup, StageSpec, TrainingStage

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch


class BaseConfig(Section):
    """Numbers of the base model's training."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, betas=(0.9, 0.999), warmup_updates=100)  # [ours]
    #: decay per update of the exported weights' EMA [ours]
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    #: s of t' = s·t / (1 + (s - 1)·t); null = model.shift [peer: Wan2.1]
    time_shift: float | None = Field(default=None, gt=0)
    #: share of samples trained at exactly t = 1, where the one-step student will live; 0 for large models [ours]
    pure_noise_fraction: float = Field(default=0.0, ge=0, le=1)
    #: probability of training a sample without its prompt, so that CFG has something to subtract [note: p = 0.1]
    null_prompt_probability: float = Field(default=0.1, ge=0, le=1)
    #: z_LR is noised like q_t at a step uniform in this range of 1000; null = off [peer: 200…600]
    low_resolution_noise: tuple[int, int] | None = (200, 600)

    @field_validator("low_resolution_noise")
    @classmethod
    def _is_a_range_of_steps(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] <= value[1] <= 1000:
            raise ValueError("must be two steps, low <= high, within 0…1000")
        return value


class Base(TrainingStage):
    """One network, one loss."""

    preview_names = ("x0_at_t_1.0", "x0_at_t_0.5")

    def __init__(self, setup: StageSetup) -> None:
        super().__init__(setup)
        self.student = self.exported = setup.network("student")
        self.networks = {"student": self.student}

    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """θ descends L."""
        with self.student.updating():
            for batch in batches:
                z_t, t, z_lr, prompt, target = self.draw(step, batch)
                loss = velocity_loss(self.student(z_t, t, z_lr, prompt).velocity, target)
                self.student.backward(loss)
                meter.add(loss=loss)
            meter.add(gradient_norm_student=self.student.step())

    def draw(self, step: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z_t, t, (augmented) z_LR, prompt embeddings and the target v of one micro-batch."""
        config, draws = self.config, self.draws(step, batch)
        z_hr, z_lr = self.latents(batch, "z_hr"), self.latents(batch, "z_lr")
        t = draws.times("time", shift=self.shift, low=0.0, high=1.0)
        t = torch.where(draws.uniform("pure noise") < config.pure_noise_fraction, torch.ones_like(t), t)
        noise = draws.noise("diffusion", z_hr)
        if config.low_resolution_noise is not None:
            low, high = config.low_resolution_noise
            level = (low + (high - low) * draws.uniform("low resolution level")) / 1000
            z_lr = q_t(z_lr, draws.noise("low resolution", z_lr), level)
        # On the CPU: these draws select captions, no tensor on the device depends on them.
        dropped = Draws(batch.keys, self._seed, self.name, step, 0).uniform("null prompt")
        captions = [
            NULL_PROMPT if drawn < config.null_prompt_probability else entry["caption"]
            for entry, drawn in zip(batch.metadata, dropped, strict=True)
        ]
        return q_t(z_hr, noise, t), t, z_lr, self.embedded(captions), velocity(z_hr, noise)

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """The x0 prediction at t = 1 and at t = 0.5."""
        z_hr, z_lr, prompt = self.latents(batch, "z_hr"), self.latents(batch, "z_lr"), self.prompts(batch)
        noise = self.draws(-1, batch).noise("diffusion", z_hr)
        predictions = {}
        for time in (1.0, 0.5):
            t = torch.full((len(batch.keys),), time, device=self._device)
            z_t = q_t(z_hr, noise, t)
            predictions[f"x0_at_t_{time}"] = x0_from_velocity(
                z_t, self.student.frozen(z_t, t, z_lr, prompt).velocity, t
            )
        return predictions


SPEC = StageSpec(
    name="base",
    summary="the multi-step base model, by flow matching",
    config=BaseConfig,
    networks=(STUDENT,),
    build=Base,
    schedule=ScheduleConfig(steps=100_000),  # [ours]
    exported_steps=lambda model: model.base_steps,
)
