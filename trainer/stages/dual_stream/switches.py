"""What later work adds to Algorithm 1, each off by default: R1 and R2, decoupled guidance, data forcing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.flow_matching import q_t, x0_from_velocity
from trainer.stages.losses import data_forcing_gradient, guidance_gradient, perturbation_penalty
from trainer.stages.random_draws import Draws


class Penalised(Protocol):
    """Configuration of a discriminator: Stage II's, and that of the fast decoder's adversarial term."""

    r1_weight: float
    r2_weight: float
    perturbation_sigma: float


def with_perturbed(config: Penalised, draws: Draws, hr: Tensor, s: Tensor) -> Tensor:
    """The discriminator's real input, followed by x + σ·ε of each penalty: HR for R1, S for R2; (n·B, C, T, H, W)."""
    inputs = [hr]
    if config.r1_weight:
        inputs.append(hr + config.perturbation_sigma * draws.noise("r1", hr))
    if config.r2_weight:
        inputs.append(s + config.perturbation_sigma * draws.noise("r2", s))
    return torch.cat(inputs)


def penalties(
    config: Penalised, logits_hr: Sequence[Tensor], logits_s: Sequence[Tensor], perturbed: Sequence[Any]
) -> dict[str, Tensor]:
    """R1 and R2 where they have a weight; `perturbed` holds the logits of their inputs in that order."""
    rest = iter(perturbed)
    found = {}
    if config.r1_weight:
        found["r1"] = perturbation_penalty(logits_hr, next(rest))
    if config.r2_weight:
        found["r2"] = perturbation_penalty(logits_s, next(rest))
    return found


@torch.no_grad()
def decoupled_guidance(
    real_score: Callable[..., Any],
    z0: Tensor,
    t: Tensor,
    noise: Tensor,
    z_lr: Tensor,
    prompts: tuple[Tensor, Tensor],
    weight: float,
) -> Tensor:
    """What the guidance of θ_R at t and ε of its own adds to DMD's gradient; of the shape of ẑ0.

    Args:
        prompts: c and ∅.
        weight: w.
    """
    z_t = q_t(z0, noise, t)
    conditional, null = (x0_from_velocity(z_t, real_score(z_t, t, z_lr, c).velocity, t) for c in prompts)
    return guidance_gradient(z0, conditional, null, weight)


@torch.no_grad()
def data_forcing(
    real_score: Callable[..., Any],
    z_hr: Tensor,
    t: Tensor,
    noise: Tensor,
    z_lr: Tensor,
    prompt: Tensor,
    normaliser: Tensor,
) -> Tensor:
    """What θ_R's error on real data at z_t^HR adds to DMD's gradient, before its weight; of the shape of z^HR."""
    z_t = q_t(z_hr, noise, t)
    z0_real = x0_from_velocity(z_t, real_score(z_t, t, z_lr, prompt).velocity, t)
    return data_forcing_gradient(z_hr, z0_real, normaliser)
