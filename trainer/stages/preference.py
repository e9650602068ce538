"""Stage III, preference-guided refinement: DPO on velocity errors.

    L = -log σ(-(β/2)·[(m_w - r_w) - (m_l - r_l)]),    m = mean‖v* - v_S‖²,  r = mean‖v* - v_ref‖²,  v* = ε - z0

w is the preferred candidate of a pair, l the other; the reference is the frozen Stage-II student. By default both are
judged at t = 1 with the very ε that produced them (the only point where the one-step student ever stands), and a small
anchor mean‖v_S - v_ref‖² keeps the student near the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from common.config import Section
from common.seeding import seeded_noise
from pipeline.flow_matching import q_t, velocity
from pipeline.model.transformer import VSRTransformer
from pipeline.sampling import one_step
from trainer.engine.network import DeepSpeedConfig, Network, OptimizerConfig
from trainer.stages.losses import velocity_loss
from trainer.stages.stage import Draws, Meter

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch


class PreferenceTrainingConfig(Section):
    """Numbers of Stage III."""

    #: β, constant: it beats one that depends on t [peer]
    beta: float = Field(default=1000.0, gt=0)
    #: one_step: t = 1 with each candidate's own ε [ours]; random: t as in Stage II with fresh ε (ablation)
    operating_point: Literal["one_step", "random"] = "one_step"
    #: weight of mean‖v_S - v_ref‖² [ours]
    anchor_weight: float = Field(default=0.1, ge=0)
    time_shift: float = Field(default=5.0, gt=0)  # only for operating_point: random [peer]
    time_range: tuple[float, float] = (0.02, 0.98)  # likewise [peer]
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, betas=(0.9, 0.999))  # [method]
    ema_decay: float = Field(default=0.99, ge=0, lt=1)  # [ours]


def per_sample_error(v: Tensor, target: Tensor) -> Tensor:
    """mean‖target - v‖² over all but the batch dimension, float32 or wider, (B,)."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    return (target.to(wide) - v.to(wide)).square().flatten(1).mean(1)


def dpo_loss(m_w: Tensor, r_w: Tensor, m_l: Tensor, r_l: Tensor, beta: float) -> Tensor:
    """mean over the batch of -log σ(-(β/2)·[(m_w - r_w) - (m_l - r_l)]); all arguments (B,)."""
    return -F.logsigmoid(-(beta / 2) * ((m_w - r_w) - (m_l - r_l))).mean()


class Preference:
    """Implements `trainer.stages.stage.Stage`; its batches hold the member `pair`."""

    name = "preference"
    preview_names: tuple[str, ...] = ("student", "reference")

    def __init__(
        self,
        config: PreferenceTrainingConfig,
        *,
        student: VSRTransformer,
        reference: VSRTransformer,
        engines: dict[str, DeepSpeedConfig],
        embed: Callable[[list[str]], Tensor],
        seed: int,
        device: torch.device | str,
    ) -> None:
        """
        Args:
            student, reference: two copies of the Stage-II student; the second stays frozen.
            engines: how `student` and `reference` are sharded.
        """
        self.config = config
        self.student = Network(
            "student",
            student,
            deepspeed=engines["student"],
            optimizer=config.optimizer,
            ema_decay=config.ema_decay,
        )
        self.reference = Network("reference", reference, deepspeed=engines["reference"])
        self.networks = {"student": self.student, "reference": self.reference}
        self.exported = self.student
        self.batches_per_step = engines["student"].gradient_accumulation
        self._embed, self._seed, self._device = embed, seed, torch.device(device)

    def train_step(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """One update."""
        meter = Meter(self._device)
        self.updates(step, batches, meter)
        return meter.means()

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
                margin = (m_l - r_l) - (m_w - r_w)
                meter.add(loss_dpo=loss_dpo, loss_anchor=loss_anchor)
                meter.add(margin=margin.mean(), preferred=(margin > 0).float().mean())
            meter.add(gradient_norm_student=self.student.step())

    def phase(self, step: int) -> None:
        """There is only one."""

    def _pair(self, step: int, batch: Batch) -> Pair:
        """Winner and loser as one batch (winners first): one forward of each network."""
        z0 = torch.cat([batch.tensors["z_win"], batch.tensors["z_lose"]]).to(self._device, torch.float32)
        z_lr = batch.tensors["z_lr"].to(self._device, torch.float32).repeat(2, 1, 1, 1, 1)
        prompt = self._embed([entry["caption"] for entry in batch.metadata]).to(self._device).repeat(2, 1, 1)
        if self.config.operating_point == "one_step":
            parts = [entry[key] for key in ("noise_win", "noise_lose") for entry in batch.metadata]
            noise = torch.stack([seeded_noise(z0.shape[1:], *part) for part in parts]).to(self._device)
            t = torch.ones(len(z0), device=self._device)
        else:
            draws = Draws(batch.keys, self._seed, self.name, step, 0, device=self._device)
            low, high = self.config.time_range
            # Winner and loser share t and ε: their errors are compared.
            noise = draws.noise("diffusion", batch.tensors["z_win"]).repeat(2, 1, 1, 1, 1)
            t = draws.times("time", shift=self.config.time_shift, low=low, high=high).repeat(2)
        return Pair((q_t(z0, noise, t), t, z_lr, prompt), velocity(z0, noise))

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """One step of student and reference from the preferred candidate's noise."""
        z_lr = batch.tensors["z_lr"].to(self._device, torch.float32)
        prompt = self._embed([entry["caption"] for entry in batch.metadata]).to(self._device)
        noise = torch.stack([seeded_noise(z_lr.shape[1:], *entry["noise_win"]) for entry in batch.metadata])
        return {
            name: one_step(
                lambda *x, call=network.frozen: call(*x).velocity, noise.to(self._device), z_lr, prompt
            )
            for name, network in self.networks.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Nothing: draws are functions of the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Pair(NamedTuple):
    """(z_t, t, z_LR, prompt) and v* = ε - z0, winners in the first half of the batch."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    target: Tensor
