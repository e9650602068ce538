"""What z_LR says of z_HR without the DiT, for small models trained from nothing.

The DiT of such a model predicts the difference to `skip_velocity`. The skip starts at z_LR, or at what a
`LowResolutionPredictor` makes of it: a linear filter and, on top of it, a residual convolutional network. That a
regression gives the mean and the diffusion model what is left of it follows Whang et al., Deblurring via Stochastic
Refinement (2022).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

#: below this time the skip stops growing as 1/t [ours]
SKIP_TIME_FLOOR = 0.15


def skip_velocity(z_t: Tensor, t: Tensor, mean: Tensor, deviation: float | Tensor) -> Tensor:
    """(z_t - ẑ0)/t for what z_LR and z_t say of z0 without a network.

    With `deviation` σ, ẑ0 = E[z0 | z_t, z_LR] if z0 - mean is Gaussian of that deviation: what is left for the
    network is at most of size √(1 + σ²) at every t. With σ = 0, ẑ0 = mean, and what is left grows as 1/t.

    Args:
        z_t: (B, C, T, H, W).
        t: (B, 1, 1, 1, 1).
        mean: z_LR or a prediction of z_HR from it, same shape as `z_t`.
        deviation: of all channels, or (1, C, 1, 1, 1).
    """
    if isinstance(deviation, float | int) and not deviation:
        return (z_t - mean) / t.clamp_min(SKIP_TIME_FLOOR)
    variance = deviation**2
    gain = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
    return gain * (z_t - (1 - t) * mean) - mean


def normalised_residual(z_t: Tensor, t: Tensor, mean: Tensor, deviation: float | Tensor) -> Tensor:
    """What z_t holds beside `mean`, of unit size at every t: ε at t = 1, (z0 - mean)/σ at t = 0.

    z_t itself is mostly what z_LR shows anyway; detail of deviation σ = 0.25 in it is a sixteenth of its square, and a
    LayerNorm scales both alike. Same arguments as `skip_velocity`, with σ > 0.
    """
    variance = deviation**2
    return (z_t - (1 - t) * mean) * ((1 - t) ** 2 * variance + t**2) ** -0.5


class LowResolutionPredictor(nn.Module):
    """A prediction of z_HR from z_LR alone, and how far z_HR lies from it.

    Blur is linear, and a DiT is slow to learn linear maps: its LayerNorms take the amplitude away. The filter is fitted
    by least squares, the residual blocks on top of it by Adam, both by `tools.fit_low_resolution_predictor`. Without
    training the prediction is z_LR.

    Args:
        channels: of the latents.
        deviation: σ to begin with.
        blocks: residual blocks of two 3 x 3 convolutions; 0: the filter alone.
        width: channels between them.
    """

    def __init__(self, channels: int, deviation: float, blocks: int = 0, width: int = 96) -> None:
        super().__init__()
        self.filter = _conv(channels, channels)
        self.log_deviation = nn.Parameter(torch.full((channels,), math.log(deviation)))
        _zero(self.filter)
        if blocks:
            self.enter, self.leave = _conv(channels, width), _conv(width, channels)
            self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
            _zero(self.leave)

    def forward(self, z_lr: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) -> the prediction of z_HR, same shape, and its deviation σ (1, C, 1, 1, 1)."""
        z = z_lr.to(self.filter.weight.dtype)
        frames = z.shape[2]
        # one latent frame at a time: it holds four of the video, and 2D is several times faster on CPUs
        x = z.transpose(1, 2).flatten(0, 1)
        predicted = x + self.filter(x)
        if hasattr(self, "blocks"):
            hidden = self.enter(x)
            for block in self.blocks:
                hidden = block(hidden)
            predicted = predicted + self.leave(hidden)
        predicted = predicted.unflatten(0, (-1, frames)).transpose(1, 2)
        return predicted.to(z_lr.dtype), self.log_deviation.to(z_lr.dtype).exp().view(1, -1, 1, 1, 1)


class ResidualBlock(nn.Module):
    """x + conv(GELU(conv(x))), without normalisation: the amplitude is what restoration goes by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv(width, width), _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B·T, C, H, W) -> same shape."""
        return x + self.second(functional.gelu(self.first(x)))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="replicate")


def _zero(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
