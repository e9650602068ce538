"""A literal reading of Algorithm 1, for comparison only: every term of every loss runs its own forwards.

Parameters that an update does not train are frozen and DMD's predictions carry no graph, as anyone would
write it; what is not done is sharing a forward between terms, or stopping one at the last tapped layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from datagen.dataset.loader import Batch
from pipeline.flow_matching import q_t, velocity, x0_from_velocity
from pipeline.sampling import one_step
from trainer.stages import losses
from trainer.stages.dual_stream.auxiliary_networks import token_grid
from trainer.stages.dual_stream.config import DualStreamConfig


class LiteralDualStream:
    """One autograd graph over bare modules, which are shared with whoever gave them."""

    def __init__(
        self, config: DualStreamConfig, modules: dict[str, nn.Module], embed: Callable[[list[str]], Tensor], device: str
    ) -> None:
        self.config, self.embed, self.device = config, embed, device
        self.student: Any = modules["student"]
        self.critic: Any = modules["critic"]
        self.real: Any = modules["real_score"]
        self.fake: Any = self.critic.transformer
        on_meta = device == "meta"
        self._adam = {
            name: None if on_meta else torch.optim.AdamW(modules[name].parameters(), 1e-6)
            for name in ("student", "critic")
        }

    def round(self, batch: Batch, *, each_term_alone: bool) -> None:
        """N auxiliary updates and one of the student.

        Args:
            each_term_alone: L_FM computes its own h^S; else it takes L_G's, as the printed names allow.
        """
        s = self._sample(batch)
        for _ in range(self.config.auxiliary_updates):
            self.critic.requires_grad_(True)
            self._auxiliary_loss(s).backward()
            self._step("critic", self.critic)
        self.student.requires_grad_(True)
        self._student_loss(s, each_term_alone).backward()
        self._step("student", self.student)

    def _auxiliary_loss(self, s: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            z0 = one_step(self._velocity(self.student), s["start"], s["z_lr"], s["prompt"])
        z_t, z_t_hr = q_t(z0, s["noise"], s["t"]), q_t(s["z_hr"], s["noise"], s["t"])
        v = self._velocity(self.fake)(z_t, s["t"], s["z_lr"], s["prompt"])
        loss_diffusion = losses.velocity_loss(v, velocity(z0, s["noise"]))
        with torch.no_grad():
            h_s, h_hr = self._features(z_t, s), self._features(z_t_hr, s)
        grid = token_grid(z_t.shape, self.fake.config.patch_size)
        d_s, d_hr = (self.critic._logits(*h, grid) for h in (h_s, h_hr))
        return loss_diffusion + losses.discriminator_loss(d_hr, d_s)

    def _student_loss(self, s: dict[str, Tensor], each_term_alone: bool) -> Tensor:
        z0 = one_step(self._velocity(self.student), s["start"], s["z_lr"], s["prompt"])
        z_t, z_t_hr = q_t(z0, s["noise"], s["t"]), q_t(s["z_hr"], s["noise"], s["t"])
        with torch.no_grad():
            z0_real, z0_fake = (
                x0_from_velocity(z_t, self._velocity(m)(z_t, s["t"], s["z_lr"], s["prompt"]), s["t"])
                for m in (self.real, self.fake)
            )
        loss = self.config.dmd_weight * losses.dmd_loss(z0, losses.dmd_gradient(z0, z0_real, z0_fake)[0])
        h_s = self._features(z_t, s)
        d_s = self.critic._logits(*h_s, token_grid(z_t.shape, self.fake.config.patch_size))
        loss = loss + self.config.gan_weight * losses.generator_loss(d_s)
        if each_term_alone:
            h_s = self._features(z_t, s)
        with torch.no_grad():
            h_hr = self._features(z_t_hr, s)
        loss_fm = losses.feature_matching_loss((*h_s[0], *h_s[1]), (*h_hr[0], *h_hr[1]), normalised=True)
        return loss + self.config.feature_matching_weight * loss_fm

    def _features(self, z: Tensor, s: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Feat_θR and Feat_θF, by forwards of their own."""
        inputs = (z, s["t"], s["z_lr"], s["prompt"], self.critic.taps)
        return self.real(*inputs).features, self.fake(*inputs).features

    def _velocity(self, model: Any) -> Callable[..., Tensor]:
        return lambda *inputs: model(*inputs).velocity

    def _sample(self, batch: Batch) -> dict[str, Tensor]:
        z_hr = batch.tensors["z_hr"]
        return {
            "z_hr": z_hr,
            "z_lr": batch.tensors["z_lr"],
            "prompt": self.embed([""] * len(z_hr)),
            "t": torch.full((len(z_hr),), 0.7, device=self.device),
            "start": torch.randn(z_hr.shape, device=self.device),
            "noise": torch.randn(z_hr.shape, device=self.device),
        }

    def _step(self, name: str, module: nn.Module) -> None:
        adam = self._adam[name]
        if adam is not None:
            adam.step()
        module.zero_grad()
        module.requires_grad_(False)
