"""Stage III, preference-guided refinement: DPO on velocity errors.

    L = -log σ(-(β/2)·[(m_w - r_w) - (m_l - r_l)]),    m = mean‖v* - v_S‖²,  r = mean‖v* - v_ref‖²,  v* = ε - z0

w is the preferred candidate of a pair, l the other; the reference is the frozen Stage-II student. Both are evaluated at
t = 1, the student's own operating point, with one fresh ε that they share. With the ε that produced a candidate the
reference's error on it is zero: margins and gradients start at zero, and the loss amplifies only the rounding of the
stored latents. A small anchor mean‖v_S - v_ref‖² keeps the student near the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from common.config import Section
from common.seeding import seeded_noise
from pipeline.flow_matching import q_t, velocity
from pipeline.sampling import one_step
from trainer.engine.config import OptimizerConfig
from trainer.stages.losses import dpo_loss, per_sample_error, velocity_loss
from trainer.stages.stage import STUDENT, Meter, NetworkSpec, ScheduleConfig, StageSetup, StageSpec, TrainingStage

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch


class PreferenceTrainingConfig(Section):
    """Numbers of Stage III."""

    #: β, constant: it beats one that depends on t [peer]
    beta: float = Field(default=1000.0, gt=0)
    #: where the loss is evaluated. one_step: t = 1, fresh ε shared by winner and loser [ours]; random: t as in Stage
    #: II, fresh shared ε; candidate_noise: t = 1, the ε that produced each candidate, which prefers nothing (ablation)
    operating_point: Literal["one_step", "random", "candidate_noise"] = "one_step"
    #: weight of mean‖v_S - v_ref‖² [ours]
    anchor_weight: float = Field(default=0.1, ge=0)
    #: shift of t, only for operating_point: random; null = model.shift [peer]
    time_shift: float | None = Field(default=None, gt=0)
    #: the shifted t is clamped to it, only for operating_point: random [peer]
    time_range: tuple[float, float] = (0.02, 0.98)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, betas=(0.9, 0.999))  # [note]
    #: decay per update of the exported weights' EMA [ours]
    ema_decay: float = Field(default=0.99, ge=0, lt=1)


class Preference(TrainingStage):
    """Student and frozen reference, two copies of the Stage-II student; its batches hold the member `pair`."""

    preview_names = ("student", "reference")

    def __init__(self, setup: StageSetup) -> None:
        super().__init__(setup)
        self.student = self.exported = setup.network("student")
        self.reference = setup.network("reference")
        self.networks = {"student": self.student, "reference": self.reference}

    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """θ_S descends L."""
        with self.student.updating():
            for batch in batches:
                pair = self._pair(step, batch)
                with torch.no_grad():
                    v_ref = self.reference.frozen(*pair.inputs).velocity
                v = self.student(*pair.inputs).velocity
                m_w, m_l = per_sample_error(v, pair.target).chunk(2)
                r_w, r_l = per_sample_error(v_ref, pair.target).chunk(2)
                loss_dpo = dpo_loss(m_w, r_w, m_l, r_l, self.config.beta)
                loss_anchor = velocity_loss(v, v_ref.detach())
                self.student.backward(loss_dpo + self.config.anchor_weight * loss_anchor)
                d_w, d_l = m_w - r_w, m_l - r_l
                meter.add(loss_dpo=loss_dpo, loss_anchor=loss_anchor)
                # Apart: a margin that grows while both errors rise is DPO's known failure.
                meter.add(winner_error_change=d_w.mean(), loser_error_change=d_l.mean())
                meter.add(margin=(d_l - d_w).mean(), preferred=(d_l > d_w).float().mean())
            meter.add(gradient_norm_student=self.student.step())

    def _pair(self, step: int, batch: Batch) -> Pair:
        """Winner and loser as one batch (winners first): one forward of each network."""
        z0 = torch.cat([self.latents(batch, "z_win"), self.latents(batch, "z_lose")])
        z_lr = self.latents(batch, "z_lr").repeat(2, 1, 1, 1, 1)
        prompt = self.prompts(batch).repeat(2, 1, 1)
        if self.config.operating_point == "candidate_noise":
            seeds = [entry[key] for key in ("noise_win", "noise_lose") for entry in batch.metadata]
            noise = torch.stack([seeded_noise(z0.shape[1:], *seed) for seed in seeds]).to(self._device)
            t = torch.ones(len(z0), device=self._device)
        else:
            draws = self.draws(step, batch)
            # Winner and loser share t and ε: their errors are compared.
            noise = draws.noise("diffusion", batch.tensors["z_win"]).repeat(2, 1, 1, 1, 1)
            low, high = self.config.time_range if self.config.operating_point == "random" else (1.0, 1.0)
            t = draws.times("time", shift=self.shift, low=low, high=high).repeat(2)
        return Pair((q_t(z0, noise, t), t, z_lr, prompt), velocity(z0, noise))

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """One step of student and reference from fresh noise; from `noise_win` the reference would give z_win."""
        z_lr, prompt = self.latents(batch, "z_lr"), self.prompts(batch)
        noise = self.draws(-1, batch).noise("generator", z_lr)
        return {
            name: one_step(lambda *x, call=network.frozen: call(*x).velocity, noise, z_lr, prompt)
            for name, network in self.networks.items()
        }


class Pair(NamedTuple):
    """(z_t, t, z_LR, prompt) and v* = ε - z0, winners in the first half of the batch."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    target: Tensor


SPEC = StageSpec(
    name="preference",
    summary="Stage III: preference refinement by DPO",
    config=PreferenceTrainingConfig,
    networks=(STUDENT, NetworkSpec("reference")),
    build=Preference,
    # No best checkpoint: PSNR against z_win ranks the untrained reference first.
    schedule=ScheduleConfig(steps=1_000, keep_best=None),  # [note]
    init="the Stage-II student",
    member="pair",
    target="z_win",
    latents_per_sample=2,  # winner and loser are one batch
)
