"""Algorithm 1 in plain PyTorch, read literally: no engines, one autograd graph, every term on its own passes.

Slow and memory-hungry on purpose, and written without the trainer's losses, engines or tricks: it is what the
trainer is compared with. Only the modules and the random draws are shared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from datagen.dataset.loader import Batch
from tests.trainer import toys
from trainer.stages.dual_stream.auxiliary_networks import Critic
from trainer.stages.dual_stream.config import DualStreamConfig
from trainer.stages.random_draws import Draws


class PlainDualStream:
    """Holds copies of the networks; `round` does N auxiliary updates and one of the student."""

    def __init__(
        self,
        config: DualStreamConfig,
        student: nn.Module,
        critic: Critic,
        real_score: nn.Module,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.seed, self.dtype = config, seed, dtype
        self.student, self.critic, self.real = (
            copy.deepcopy(m).to(dtype).requires_grad_(True) for m in (student, critic, real_score)
        )
        self.real.requires_grad_(False)
        self.fake = self.critic.transformer
        self.optimizer_s = torch.optim.AdamW(self.student.parameters(), **_adam(config.student))
        groups: list[dict[str, Any]] = []
        if self.fake is not None:
            groups.append({"params": list(self.fake.parameters())})
        if len(critic.heads):
            groups.append({"params": list(self.critic.heads.parameters()), "lr": config.heads_learning_rate})
        self.optimizer_f = torch.optim.AdamW(groups, **_adam(config.fake_score))

    def round(self, step: int, batches: list[Batch]) -> dict[str, float]:
        logs: list[dict[str, float]] = []
        for update, batch in enumerate(batches[:-1]):
            losses = self.auxiliary_losses(self.sample(batch, step, update))
            self.optimizer_f.zero_grad()
            sum(losses.values()).backward()
            norms = {"critic": _norm(self.critic)}
            for name, part, largest in (
                ("fake_score", self.fake, self.config.fake_score.gradient_clip),
                ("heads", self.critic.heads, self.config.heads_gradient_clip),
            ):
                if part is not None and list(part.parameters()):
                    norms[name] = nn.utils.clip_grad_norm_(part.parameters(), largest).item()
            self.optimizer_f.step()
            logs.append({k: v.item() for k, v in losses.items()})
            logs[-1] |= {f"gradient_norm_{name}": value for name, value in norms.items()}
        log = {key: sum(entry[key] for entry in logs) / len(logs) for key in logs[0]}
        losses = self.student_losses(self.sample(batches[-1], step, len(batches) - 1))
        self.optimizer_s.zero_grad()
        losses["loss_student"].backward()
        self.critic.zero_grad()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.config.student.gradient_clip)
        self.optimizer_s.step()
        return log | {k: v.item() for k, v in losses.items()} | {"gradient_norm_student": norm.item()}

    def sample(self, batch: Batch, step: int, update: int) -> dict[str, Tensor]:
        draws = Draws(batch.keys, self.seed, "dual_stream", step, update)
        low, high = self.config.time_range
        z_hr = batch.tensors["z_hr"]
        s = {
            "z_hr": z_hr,
            "z_lr": batch.tensors["z_lr"],
            "c": toys.embed([entry["caption"] for entry in batch.metadata]),
            "t": draws.times("time", shift=self.config.time_shift, low=low, high=high),
            "start": draws.noise("generator", z_hr),
            "eps": draws.noise("diffusion", z_hr),
            "eps_r1": draws.noise("r1", z_hr),
            "eps_r2": draws.noise("r2", z_hr),
            "eps_guidance": draws.noise("guidance", z_hr),
        }
        if self.config.guidance_time_range:
            low, high = self.config.guidance_time_range
            s["t_guidance"] = draws.times("guidance_time", shift=self.config.time_shift, low=low, high=high)
            s["null"] = toys.embed([""] * len(batch.keys))
        return {key: value.to(self.dtype) for key, value in s.items()}

    def auxiliary_losses(self, s: dict[str, Tensor]) -> dict[str, Tensor]:
        z0 = self.one_step(s).detach()
        z_t, z_t_hr = self.q(z0, s), self.q(s["z_hr"], s)
        v = self.fake(z_t, s["t"], s["z_lr"], s["c"]).velocity
        losses = {"loss_diffusion": ((v - (s["eps"] - z0)) ** 2).mean()}
        if self.config.gan:
            with torch.no_grad():
                h_s, h_hr = self.features(z_t, s), self.features(z_t_hr, s)
            d_s, d_hr = self.judge(h_s), self.judge(h_hr)
            hinge = [(1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean() for r, f in zip(d_hr, d_s, strict=True)]
            losses["loss_discriminator"] = sum(hinge) / len(hinge)
            for name, x, logits in (("r1", z_t_hr, d_hr), ("r2", z_t, d_s)):
                if weight := getattr(self.config, f"{name}_weight"):
                    with torch.no_grad():
                        h = self.features(x + self.config.perturbation_sigma * s[f"eps_{name}"], s)
                    pairs = zip(self.judge(h), logits, strict=True)
                    losses[name] = weight * sum(((a - b) ** 2).mean() for a, b in pairs) / len(logits)
        return losses

    def student_losses(self, s: dict[str, Tensor]) -> dict[str, Tensor]:
        c = self.config
        z0 = self.one_step(s)
        z_t = self.q(z0, s)
        time = s["t"].view(-1, 1, 1, 1, 1)
        losses: dict[str, Tensor] = {}
        total = z0.sum() * 0
        if c.dmd_weight:
            z0_r = z_t - time * self.real(z_t, s["t"], s["z_lr"], s["c"]).velocity
            z0_f = z_t - time * self.fake(z_t, s["t"], s["z_lr"], s["c"]).velocity
            grads = torch.stack([(f - r) / (z - r).abs().mean() for f, r, z in zip(z0_f, z0_r, z0, strict=True)])
            if c.guidance_time_range:
                late = s["t_guidance"].view(-1, 1, 1, 1, 1)
                x = (1 - late) * z0 + late * s["eps_guidance"]
                with_text, without = (
                    x - late * self.real(x, s["t_guidance"], s["z_lr"], s[text]).velocity for text in ("c", "null")
                )
                scale = torch.stack([(z - w).abs().mean() for z, w in zip(z0, with_text, strict=True)])
                grads = grads - c.real_score_guidance * (with_text - without) / scale.view(-1, 1, 1, 1, 1)
            if c.data_forcing_weight:
                x = self.q(s["z_hr"], s)
                wrong = x - time * self.real(x, s["t"], s["z_lr"], s["c"]).velocity - s["z_hr"]
                scale = torch.stack([(z - r).abs().mean() for r, z in zip(z0_r, z0, strict=True)])
                grads = grads + c.data_forcing_weight * wrong / scale.view(-1, 1, 1, 1, 1)
            target = (z0 - grads).detach()
            losses["loss_dmd"] = ((z0 - target) ** 2).mean() / 2
            total = total + c.dmd_weight * losses["loss_dmd"]
        if c.gan:
            maps = self.judge(self.features(z_t, s))
            losses["loss_generator"] = -sum(m.mean() for m in maps) / len(maps)
            h_s, h_hr = self.features(z_t, s), self.features(self.q(s["z_hr"], s), s)
            norm = _normed if c.feature_matching == "normalised" else (lambda h: h)
            difference = (
                torch.cat([norm(part) for h in h_s for part in h], -1)
                - torch.cat([norm(part) for h in h_hr for part in h], -1).detach()
            )
            losses["loss_feature_matching"] = (difference**2).mean()
            total = total + c.gan_weight * losses["loss_generator"]
            total = total + c.feature_matching_weight * losses["loss_feature_matching"]
        return losses | {"loss_student": total}

    def one_step(self, s: dict[str, Tensor]) -> Tensor:
        ones = torch.ones_like(s["t"])
        return s["start"] - self.student(s["start"], ones, s["z_lr"], s["c"]).velocity

    def q(self, z0: Tensor, s: dict[str, Tensor]) -> Tensor:
        time = s["t"].view(-1, 1, 1, 1, 1)
        return (1 - time) * z0 + time * s["eps"]

    def features(self, z_t: Tensor, s: dict[str, Tensor]) -> list[list[Tensor]]:
        """Per tapped layer, the features of each tapped model."""
        models = {"both": (self.real, self.fake), "real": (self.real,), "fake": (self.fake,)}[self.config.tapped]
        taps = self.critic.taps
        return list(map(list, zip(*[m(z_t, s["t"], s["z_lr"], s["c"], taps).features for m in models], strict=True)))

    def judge(self, features: list[list[Tensor]]) -> list[Tensor]:
        _, t, h, w = toys.LATENT
        maps = []
        for head, parts in zip(self.critic.heads, features, strict=True):
            tokens = torch.cat([_normed(part) for part in parts], -1)
            maps.append(head(tokens.transpose(1, 2).reshape(len(tokens), -1, t, h // 2, w // 2)))
        return maps


def _normed(h: Tensor) -> Tensor:
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def _norm(module: nn.Module) -> float:
    return torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item()


def _adam(optimizer: Any) -> dict[str, Any]:
    return {"lr": optimizer.learning_rate, "betas": optimizer.betas, "weight_decay": optimizer.weight_decay}
