"""Stage III, preference-guided refinement: DPO on velocity errors.

    L = -log σ(-(β/2)·[(m_w - r_w) - (m_l - r_l)]),    m = mean‖v* - v_S‖²,  r = mean‖v* - v_ref‖²,  v* = ε - z0

w is the preferred candidate of a pair, l the other; the reference is the frozen Stage-II student. Both are evaluated at
t = 1, the student's own operating point, with one fresh ε that they share. With the ε that produced a candidate the
reference's error on it is zero: margins and gradients start at zero, and the loss amplifies only the rounding of the
stored latents. A small anchor mean‖v_S - v_ref‖² keeps the student near the reference; `dmd_weight` keeps Stage II's
distribution matching on beside the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from common.config import Section
from common.seeding import seeded_noise
from pipeline.flow_matching import q_t, velocity, x0_from_velocity
from pipeline.sampling import one_step
from trainer.engine.config import OptimizerConfig
from trainer.stages.losses import dmd_gradient, dmd_loss, dpo_loss, per_sample_error, velocity_loss
from trainer.stages.random_draws import Draws
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
    #: the worse candidate is preferred: what right labels are held against (ablation)
    swap_labels: bool = False
    #: weight of mean‖v_S - v_ref‖² [ours]
    anchor_weight: float = Field(default=0.1, ge=0)
    #: λ_DMD of a regulariser: Stage II's DMD on the student's samples, with a fake score of its own that starts as the
    #: real score (--teacher); 0 = none [peer: DMDR, 2511.13649]
    dmd_weight: float = Field(default=0.0, ge=0)
    #: updates of the fake score before each of the student's, only with dmd_weight [paper: N of Stage II]
    auxiliary_updates: int = Field(default=3, ge=1)
    fake_score: OptimizerConfig = OptimizerConfig(learning_rate=2e-6)  # [peer]
    #: shift of t, only for operating_point: random and dmd_weight; null = model.shift [peer]
    time_shift: float | None = Field(default=None, gt=0)
    #: the shifted t is clamped to it, only for operating_point: random and dmd_weight [peer]
    time_range: tuple[float, float] = (0.02, 0.98)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, betas=(0.9, 0.999))  # [note]
    #: decay per update of the exported weights' EMA [ours]
    ema_decay: float = Field(default=0.99, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> PreferenceTrainingConfig:
        if self.regularised and self.operating_point != "one_step":
            raise ValueError("dmd_weight needs operating_point: one_step, where the student's forward is its sample")
        return self

    @property
    def regularised(self) -> bool:
        """Whether DMD is on, hence a fake and a real score are there."""
        return self.dmd_weight > 0


class Pair(NamedTuple):
    """One micro-batch; latents (B, C, T, H, W), float32."""

    #: (z_t, t, z_LR, prompt): (B, …) where winner and loser share z_t = ε, else (2·B, …), winners first
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    #: v* = ε - z0 of the winner and of the loser
    target_w: Tensor
    target_l: Tensor

    def errors(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """mean‖v* - v‖² of the winner and of the loser, (B,) each."""
        v_w, v_l = (v, v) if len(v) == len(self.target_w) else v.chunk(2)
        return per_sample_error(v_w, self.target_w), per_sample_error(v_l, self.target_l)


class Preference(TrainingStage):
    """Student and frozen reference, two copies of the Stage-II student; its batches hold the member `pair`.

    With `dmd_weight` a fake and a real score as well.
    """

    preview_names = ("student", "reference")

    def __init__(self, setup: StageSetup) -> None:
        super().__init__(setup)
        self.student = self.exported = setup.network("student")
        self.reference = setup.network("reference")
        self.networks = {"student": self.student, "reference": self.reference}
        self._accumulation = self.student.config.gradient_accumulation
        if self.config.regularised:
            self.fake_score, self.real_score = setup.network("fake_score"), setup.network("real_score")
            self.networks |= {"fake_score": self.fake_score, "real_score": self.real_score}

    @property
    def batches_per_step(self) -> int:
        """Those of the student's update, and of the fake score's where there is one."""
        auxiliary = self.config.auxiliary_updates if self.config.regularised else 0
        return (auxiliary + 1) * self._accumulation

    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """θ_S descends L; before it, θ_F descends L_Diff where DMD regularises."""
        size = self._accumulation
        *auxiliary, own = [batches[first : first + size] for first in range(0, len(batches), size)]
        for update, micro_batches in enumerate(auxiliary):
            self._fake_score_update(step, update, micro_batches, meter)
        with self.student.updating():
            for batch in own:
                pair = self._pair(step, batch)
                with torch.no_grad():
                    v_ref = self.reference.frozen(*pair.inputs).velocity
                v = self.student(*pair.inputs).velocity
                (m_w, m_l), (r_w, r_l) = pair.errors(v), pair.errors(v_ref)
                loss_dpo = dpo_loss(m_w, r_w, m_l, r_l, self.config.beta)
                loss_anchor = velocity_loss(v, v_ref.detach())
                loss = loss_dpo + self.config.anchor_weight * loss_anchor
                if self.config.regularised:
                    loss_dmd = self._dmd(step, batch, pair, v)
                    loss = loss + self.config.dmd_weight * loss_dmd
                    meter.add(loss_dmd=loss_dmd)
                self.student.backward(loss)
                d_w, d_l = m_w - r_w, m_l - r_l
                meter.add(loss_dpo=loss_dpo, loss_anchor=loss_anchor)
                # Apart: a margin that grows while both errors rise is DPO's known failure.
                meter.add(winner_error_change=d_w.mean(), loser_error_change=d_l.mean())
                meter.add(margin=(d_l - d_w).mean(), preferred=(d_l > d_w).float().mean())
            meter.add(gradient_norm_student=self.student.step())

    def _pair(self, step: int, batch: Batch) -> Pair:
        """Noise, times and targets of a micro-batch. At t = 1 with one ε, z_t is the same for winner and loser."""
        sides = ("lose", "win") if self.config.swap_labels else ("win", "lose")
        z_w, z_l, z_lr = (self.latents(batch, name) for name in (*(f"z_{side}" for side in sides), "z_lr"))
        prompt, draws = self.prompts(batch), self.draws(step, batch)
        one = torch.ones(len(z_lr), device=self._device)
        if self.config.operating_point == "one_step":
            noise = draws.noise("diffusion", z_w)
            return Pair((noise, one, z_lr, prompt), velocity(z_w, noise), velocity(z_l, noise))
        if self.config.operating_point == "candidate_noise":
            t, own = one, [[entry[f"noise_{side}"] for entry in batch.metadata] for side in sides]
            noise_w, noise_l = (
                torch.stack([seeded_noise(z_w.shape[1:], *parts) for parts in side]).to(self._device) for side in own
            )
        else:
            t, noise_w = self._time(draws, "time"), draws.noise("diffusion", z_w)
            noise_l = noise_w  # their errors are compared
        z_t = torch.cat([q_t(z_w, noise_w, t), q_t(z_l, noise_l, t)])
        inputs = (z_t, t.repeat(2), z_lr.repeat(2, 1, 1, 1, 1), prompt.repeat(2, 1, 1))
        return Pair(inputs, velocity(z_w, noise_w), velocity(z_l, noise_l))

    def _time(self, draws: Draws, purpose: str) -> Tensor:
        low, high = self.config.time_range
        return draws.times(purpose, shift=self.shift, low=low, high=high)

    # --- the DMD regulariser ----------------------------------------------------------------------------------

    def _fake_score_update(self, step: int, update: int, batches: Sequence[Batch], meter: Meter) -> None:
        """θ_F descends L_Diff on the student's samples (Algorithm 1, lines 3-7 and 14)."""
        with self.fake_score.updating():
            for batch in batches:
                draws = self.draws(step, batch, update)
                z_lr, prompt = self.latents(batch, "z_lr"), self.prompts(batch)
                noise_s, noise = draws.noise("generator", z_lr), draws.noise("dmd", z_lr)
                with torch.no_grad():
                    z0 = one_step(lambda *x: self.student.frozen(*x).velocity, noise_s, z_lr, prompt)
                t = self._time(draws, "dmd_time")
                v = self.fake_score(q_t(z0, noise, t), t, z_lr, prompt).velocity
                loss = velocity_loss(v, velocity(z0, noise))
                self.fake_score.backward(loss)
                meter.add(loss_diffusion=loss)
            meter.add(gradient_norm_fake_score=self.fake_score.step())

    def _dmd(self, step: int, batch: Batch, pair: Pair, v: Tensor) -> Tensor:
        """L_DMD at the student's sample ẑ0 = ε - v (Algorithm 1, lines 17-21)."""
        noise_s, one, z_lr, prompt = pair.inputs
        z0 = x0_from_velocity(noise_s, v, one)
        draws = self.draws(step, batch, self.config.auxiliary_updates)
        t = self._time(draws, "dmd_time")
        z_t = q_t(z0.detach(), draws.noise("dmd", z_lr), t)
        with torch.no_grad():
            z0_real, z0_fake = (
                x0_from_velocity(z_t, score.frozen(z_t, t, z_lr, prompt).velocity, t)
                for score in (self.real_score, self.fake_score)
            )
        return dmd_loss(z0, dmd_gradient(z0, z0_real, z0_fake)[0])

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """One step of student and reference from fresh noise; from `noise_win` the reference would give z_win."""
        z_lr, prompt = self.latents(batch, "z_lr"), self.prompts(batch)
        noise = self.draws(-1, batch).noise("generator", z_lr)
        return {
            name: one_step(lambda *x, call=self.networks[name].frozen: call(*x).velocity, noise, z_lr, prompt)
            for name in self.preview_names
        }


SPEC = StageSpec(
    name="preference",
    summary="Stage III: preference refinement by DPO",
    config=PreferenceTrainingConfig,
    networks=(
        replace(STUDENT, trains_predictor=True),
        NetworkSpec("reference"),
        NetworkSpec("fake_score", weights="teacher", optimizer="fake_score", lora="critic", needed="regularised"),
        NetworkSpec("real_score", weights="teacher", needed="regularised"),
    ),
    build=Preference,
    # No best checkpoint: PSNR against z_win ranks the untrained reference first.
    schedule=ScheduleConfig(steps=1_000, keep_best=None),  # [note]
    init="the Stage-II student",
    teacher="the real score of Stage II",
    teacher_needed="regularised",
    members=("pair",),
    target="z_win",
    latents_per_sample=lambda config: 1 if config.operating_point == "one_step" else 2,
)
