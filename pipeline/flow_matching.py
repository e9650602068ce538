"""Rectified flow: the straight path between a clean latent z0 and noise ε, in the paper's symbols.

    z_t = (1 - t)·z0 + t·ε,    v = ε - z0,    z0 = z_t - t·v,    t in [0, 1]

All functions take latents of shape (B, C, T, H, W) and times of shape (B,), compute in float32 or the
precision of the input if that is higher, and return that precision: x0 = z_t - t·v cancels badly in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return _wide(t).reshape(-1, *([1] * (like.ndim - 1)))


def q_t(z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t)·z0 + t·ε."""
    time = _per_sample(t, z0)
    return (1 - time) * _wide(z0) + time * _wide(noise)


def velocity(z0: Tensor, noise: Tensor) -> Tensor:
    """v = ε - z0, the target of every velocity regression."""
    return _wide(noise) - _wide(z0)


def x0_from_velocity(z_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """z0 = z_t - t·v."""
    return _wide(z_t) - _per_sample(t, z_t) * _wide(v)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s·t / (1 + (s - 1)·t): more of the schedule at high noise when s > 1 (SD3; Wan uses s = 5)."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, shift: float) -> Tensor:
    """Times 1 = t_0 > … > t_steps = 0 of a sampler with `steps` Euler steps, shape (steps + 1,), float64."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
