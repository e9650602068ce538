"""Every loss of the method as one named function, in the paper's symbols.

All reduce with means: with sums, the balance of the λ's would change with the size of the clip. All compute
in float32 (or the precision of the input if that is higher); network outputs may arrive in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from trainer.stages.dual_stream.config import GanLoss


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean_over_heads(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def velocity_loss(v: Tensor, target: Tensor) -> Tensor:
    """mean‖v_θ − v‖²: L_Diff of the fake score, and every velocity regression of the other stages."""
    return (_wide(v) - _wide(target)).square().mean()


def discriminator_loss(d_hr: Sequence[Tensor], d_s: Sequence[Tensor], kind: GanLoss = "hinge") -> Tensor:
    """L_D = mean max(0, 1 − D(h^HR)) + mean max(0, 1 + D(h^S)), averaged over the heads.

    Args:
        d_hr: one map of logits per head, for the HR latents.
        d_s: the same for the student's.
        kind: `softplus`: softplus(−D_HR) + softplus(D_S); `relativistic`: softplus(−(D_HR − D_S)).
    """
    losses = []
    for real, fake in zip(map(_wide, d_hr), map(_wide, d_s), strict=True):
        if kind == "hinge":
            losses.append(F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        elif kind == "softplus":
            losses.append(F.softplus(-real).mean() + F.softplus(fake).mean())
        else:
            losses.append(F.softplus(fake - real).mean())
    return _mean_over_heads(losses)


def generator_loss(d_s: Sequence[Tensor], d_hr: Sequence[Tensor] = (), kind: GanLoss = "hinge") -> Tensor:
    """L_G = −mean D(h^S), averaged over the heads.

    Args:
        d_hr: only the relativistic loss looks at it; it is a constant.
        kind: `softplus`: softplus(−D_S); `relativistic`: softplus(−(D_S − D_HR)).
    """
    if kind == "relativistic":
        pairs = zip(map(_wide, d_s), map(_wide, d_hr), strict=True)
        return _mean_over_heads([F.softplus(real.detach() - fake).mean() for fake, real in pairs])
    if kind == "softplus":
        return _mean_over_heads([F.softplus(-_wide(fake)).mean() for fake in d_s])
    return -_mean_over_heads([_wide(fake).mean() for fake in d_s])


def per_token_norm(h: Tensor) -> Tensor:
    """Features (B, N, C) with mean 0 and variance 1 over the channels of each token.

    The residual stream grows with depth and training; without this the heads' learning rate would too.
    """
    return F.layer_norm(_wide(h), h.shape[-1:])


def feature_matching_loss(h_s: Sequence[Tensor], h_hr: Sequence[Tensor], *, normalised: bool) -> Tensor:
    """L_FM = mean‖h^S − h^HR‖² over all tapped layers and models; h^HR is a constant.

    The tapped tensors have one size, so the mean of their means is the mean over the concatenation.

    Args:
        normalised: match `per_token_norm(h)`. Raw features weigh a few channels of the residual stream.
    """
    norm = per_token_norm if normalised else _wide
    pairs = zip(h_s, h_hr, strict=True)
    return _mean_over_heads([(norm(s) - norm(hr).detach()).square().mean() for s, hr in pairs])


def perturbation_penalty(d: Sequence[Tensor], d_perturbed: Sequence[Tensor]) -> Tensor:
    """Approximate R1 (x from the data) or R2 (x from the student): mean‖D(x) − D(x + σ·ε)‖², averaged over the heads.

    A finite difference in place of a second derivative [peer: APT, 2501.08316, Eq. 4].
    """
    pairs = zip(map(_wide, d), map(_wide, d_perturbed), strict=True)
    return _mean_over_heads([(plain - perturbed).square().mean() for plain, perturbed in pairs])


def dmd_gradient(z0: Tensor, z0_real: Tensor, z0_fake: Tensor) -> tuple[Tensor, Tensor]:
    """Grad = (ẑ0^F − ẑ0^R) / mean|ẑ0 − ẑ0^R|, and that normaliser, shape (B,).

    The mean is per sample: one over the batch would let a hard clip scale down all the others. Where it is
    zero or anything is not finite, Grad is 0 instead.
    """
    z0, z0_real, z0_fake = (_wide(z).detach() for z in (z0, z0_real, z0_fake))
    normaliser = (z0 - z0_real).abs().flatten(1).mean(1)
    gradient = (z0_fake - z0_real) / normaliser.reshape(-1, *([1] * (z0.ndim - 1)))
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0), normaliser


def guidance_gradient(z0: Tensor, z0_conditional: Tensor, z0_null: Tensor, weight: float) -> Tensor:
    """w·(ẑ0^R(∅) − ẑ0^R(c)) / mean|ẑ0 − ẑ0^R(c)|: the guidance part of DMD's gradient, at a time of its own.

    Subtracting it from ẑ0 is a step along the guidance [peer: Decoupled DMD, 2511.22677].
    """
    gradient, _ = dmd_gradient(z0, z0_conditional, z0_null)
    # dmd_gradient is (third − second) / mean|first − second|
    return weight * gradient


def data_forcing_gradient(z_hr: Tensor, z0_real_hr: Tensor, normaliser: Tensor) -> Tensor:
    """(ẑ0^R(z_t^HR) − z^HR) / normaliser: what θ_R gets wrong about real data, in the units of DMD's gradient.

    Where the real score exaggerates the data, DMD's target is lowered by as much [ours, after Data-Forcing
    Distillation, 2606.18478].

    Args:
        normaliser: DMD's, (B,).
    """
    error = _wide(z0_real_hr).detach() - _wide(z_hr).detach()
    scaled = error / normaliser.reshape(-1, *([1] * (z_hr.ndim - 1)))
    return torch.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)


def dmd_loss(z0: Tensor, gradient: Tensor) -> Tensor:
    """L_DMD = ½·mean‖ẑ0 − sg[ẑ0 − Grad]‖²; its gradient with respect to ẑ0 is Grad / numel."""
    z0 = _wide(z0)
    return 0.5 * (z0 - (z0 - gradient).detach()).square().mean()


def reconstruction_loss(decoded: Tensor, pixels: Tensor, l1_weight: float) -> Tensor:
    """mean‖y − x‖² + λ_1·mean|y − x| of the codec."""
    error = _wide(decoded) - _wide(pixels)
    return error.square().mean() + l1_weight * error.abs().mean()


def multiscale_gradient_loss(decoded: Tensor, pixels: Tensor, scales: int) -> Tensor:
    """L_∇ = mean over sizes and directions of mean|∂y − ∂x|, differences of neighbouring pixels.

    Args:
        decoded, pixels: (B, 3, F, H, W).
        scales: sizes; each is the one before, averaged over 2 x 2 pixels.
    """
    error = (_wide(decoded) - _wide(pixels)).transpose(1, 2).flatten(0, 1)
    losses = []
    for scale in range(scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        losses += [error.diff(dim=axis).abs().mean() for axis in (-2, -1)]
    return torch.stack(losses).mean()


#: of 8 bits, in pixels of [-1, 1]
GREY_LEVEL = 2 / 255


def grid_loss(decoded: Tensor, pixels: Tensor, period: int) -> Tensor:
    """L_grid = mean‖d(y) − d(x)‖², d: how far the energy of neighbouring differences at each of `period` phases is from
    their mean, in units of x's mean and one grey level.

    Zero where y prints the squares of its latent places no more than x does. Noise adds the same energy to all phases,
    so it does not hide them [ours].

    Args:
        decoded, pixels: (B, 3, F, H, W); the clip begins on a border, so that phase `period` - 1 crosses the next one.
    """
    errors = []
    for axis in (-2, -1):
        y, x = (_phase_energy(_wide(clip), axis, period) for clip in (decoded, pixels.detach()))
        # Without the level, an almost flat clip would outweigh all others thousands of times.
        scale = x.mean(1, keepdim=True) + GREY_LEVEL**2
        errors.append(((y - y.mean(1, keepdim=True)) - (x - x.mean(1, keepdim=True))) / scale)
    return torch.stack(errors).square().mean()


def _phase_energy(clip: Tensor, axis: int, period: int) -> Tensor:
    """(B, period)."""
    squared = clip.diff(dim=axis).square().movedim(axis, -1)
    return torch.stack([squared[..., phase::period].flatten(1).mean(1) for phase in range(period)], dim=1)


def latent_scale_loss(z: Tensor) -> Tensor:
    """(mean z² − 1)² of normalised latents."""
    return (_wide(z).square().mean() - 1).square()


def per_sample_error(v: Tensor, target: Tensor) -> Tensor:
    """m = mean‖v* − v‖² over all but the batch dimension, (B,)."""
    return (_wide(target) - _wide(v)).square().flatten(1).mean(1)


def dpo_loss(m_w: Tensor, r_w: Tensor, m_l: Tensor, r_l: Tensor, beta: float) -> Tensor:
    """L = mean over the batch of −log σ(−(β/2)·[(m_w − r_w) − (m_l − r_l)]).

    Args:
        m_w, m_l: the student's errors on the preferred and on the other candidate, (B,).
        r_w, r_l: the reference's.
    """
    return -F.logsigmoid(-(beta / 2) * ((m_w - r_w) - (m_l - r_l))).mean()
