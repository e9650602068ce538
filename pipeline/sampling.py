"""From noise to a clean latent: many Euler steps with the base model, one step with the student."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.flow_matching import time_grid, x0_from_velocity

#: (z_t, t of shape (B,), z_LR, prompt embeddings) -> velocity, all (B, C, T, H, W)
VelocityModel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def guided_velocity(
    model: VelocityModel,
    z_t: Tensor,
    t: Tensor,
    z_lr: Tensor,
    prompt: Tensor,
    null_prompt: Tensor,
    guidance_weight: float,
) -> Tensor:
    """v_cfg = v(c) + w·(v(c) - v(∅)) = (1 + w)·v(c) - w·v(∅).

    `guidance_weight` is this w: 0 means no guidance (and costs one forward, not two).
    """
    conditional = model(z_t, t, z_lr, prompt)
    if guidance_weight == 0:
        return conditional
    unconditional = model(z_t, t, z_lr, null_prompt)
    return conditional + guidance_weight * (conditional - unconditional)


def euler_sample(
    model: VelocityModel,
    noise: Tensor,
    z_lr: Tensor,
    prompt: Tensor,
    *,
    steps: int,
    shift: float,
    null_prompt: Tensor | None = None,
    guidance_weight: float = 0.0,
) -> Tensor:
    """Integrate dz/dt = v from t = 1 to 0 in `steps` Euler steps; float32 state.

    `steps=1` is the student's one step, ẑ0 = ε - v_S(ε, t=1, z_LR, c).
    """
    if guidance_weight and null_prompt is None:
        raise ValueError("guidance needs null_prompt")
    grid = time_grid(steps, shift).tolist()
    z = noise.float()
    for index in range(steps):
        t = torch.full((z.shape[0],), grid[index], device=z.device)
        if null_prompt is None:
            v = model(z, t, z_lr, prompt)
        else:
            v = guided_velocity(model, z, t, z_lr, prompt, null_prompt, guidance_weight)
        z = z + (grid[index + 1] - grid[index]) * v.float()
    return z


def one_step(model: VelocityModel, noise: Tensor, z_lr: Tensor, prompt: Tensor) -> Tensor:
    """ẑ0 = ε - v_S(ε, t=1, z_LR, c): the generator always sits at t = 1. Differentiable."""
    t = torch.ones(noise.shape[0], device=noise.device)
    return x0_from_velocity(noise, model(noise, t, z_lr, prompt), t)
