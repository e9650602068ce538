"""The tiny preset's video VAE: a linear block transform to encode, the same plus a small network to decode.

It stands where `AutoencoderKLWan` stands and has its surface (`encode(x).latent_dist.mode()`, `decode(z).sample`,
8x in space, 4x in time, the first frame on its own), but fits a CPU: a 9x128x128 clip costs milliseconds. The
transform starts as a PCA of 4x8x8 pixel blocks; training bends it and teaches the decoder to hide block borders.
`python -m tools.fit_tiny_vae` makes the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


@dataclass
class DeterministicPosterior:
    """A posterior without spread, so that code written for KL autoencoders reads the same."""

    mean: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.mean


@dataclass
class EncoderOutput:
    latent_dist: DeterministicPosterior


@dataclass
class DecoderOutput:
    sample: Tensor


class TinyVideoVAE(ModelMixin, ConfigMixin):
    """8x8x4 block transform with a learned decoder.

    Args:
        z_dim: latent channels C.
        hidden_dim: width of the decoder's refinement network.
        num_blocks: its residual blocks.
        latents_mean, latents_std: per-channel normalisation, applied by `pipeline.model.vae`, not here (as in Wan).
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 32,
        hidden_dim: int = 128,
        num_blocks: int = 3,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scale_factor_spatial: int = 8,
        scale_factor_temporal: int = 4,
    ) -> None:
        super().__init__()
        if latents_mean is None or latents_std is None:
            self.register_to_config(latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim)
        block = (scale_factor_temporal, scale_factor_spatial, scale_factor_spatial)
        frame = (1, scale_factor_spatial, scale_factor_spatial)
        self.encode_first = nn.Conv3d(3, z_dim, frame, stride=frame)
        self.encode_next = nn.Conv3d(3, z_dim, block, stride=block)
        self.decode_first = nn.ConvTranspose3d(z_dim, 3, frame, stride=frame)
        self.decode_next = nn.ConvTranspose3d(z_dim, 3, block, stride=block)
        self.refine_in = nn.Conv2d(2 * z_dim, hidden_dim, 3, padding=1)
        self.refine_blocks = nn.ModuleList(ResidualBlock(hidden_dim) for _ in range(num_blocks))
        pixels = 3 * scale_factor_spatial**2
        self.refine_first = nn.Conv2d(hidden_dim, pixels, 1)
        self.refine_next = nn.Conv2d(hidden_dim, pixels * scale_factor_temporal, 1)
        for head in (self.refine_first, self.refine_next):  # decoding starts as the plain block transform
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def encode(self, x: Tensor) -> EncoderOutput:
        """Pixels (B, 3, 4k+1, H, W) in [-1, 1] to latents (B, C, k+1, H/8, W/8)."""
        latents = [self.encode_first(x[:, :, :1])]
        if x.shape[2] > 1:
            latents.append(self.encode_next(x[:, :, 1:]))
        return EncoderOutput(DeterministicPosterior(torch.cat(latents, dim=2)))

    def decode(self, z: Tensor) -> DecoderOutput:
        """Latents (B, C, k+1, h, w) to pixels (B, 3, 4k+1, 8h, 8w), not clamped; causal in time."""
        hidden = self._refinement(z)
        first = self.decode_first(z[:, :, :1]) + self._to_pixels(self.refine_first(hidden[:, 0]), 1)
        frames = [first]
        for index in range(1, z.shape[2]):
            linear = self.decode_next(z[:, :, index : index + 1])
            refined = self._to_pixels(self.refine_next(hidden[:, index]), self.config.scale_factor_temporal)
            frames.append(linear + refined)
        return DecoderOutput(torch.cat(frames, dim=2))

    def _refinement(self, z: Tensor) -> Tensor:
        """Features (B, T, hidden, h, w) from each latent frame and the one before it."""
        scale = torch.tensor(self.config.latents_std, device=z.device, dtype=z.dtype).view(1, -1, 1, 1, 1)
        normalised = z / scale
        before = F.pad(normalised, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        x = torch.cat([normalised, before], dim=1).transpose(1, 2)
        batch, frames = x.shape[:2]
        hidden = self.refine_in(x.flatten(0, 1))
        for block in self.refine_blocks:
            hidden = block(hidden)
        return hidden.unflatten(0, (batch, frames))

    def _to_pixels(self, x: Tensor, frames: int) -> Tensor:
        """(B, 3·frames·8·8, h, w) to (B, 3, frames, 8h, 8w)."""
        return F.pixel_shuffle(x, self.config.scale_factor_spatial).unflatten(1, (3, frames))


class ResidualBlock(nn.Module):
    """x + conv(gelu(conv(gelu(x)))), 3x3 and 1x1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(dim, dim, 3, padding=1)
        self.mix = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.gelu(self.spatial(F.gelu(x))))
