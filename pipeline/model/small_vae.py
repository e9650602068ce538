"""A video VAE for small models: a lapped linear transform plus convolutions, without block borders.

It stands where `AutoencoderKLWan` stands and has its surface, like `TinyVideoVAE`: 8x in space, 4x in time, the first
frame on its own. Windows of 16 x 16 pixels overlap by half, so that a change of one latent fades out instead of ending
at a square. `python -m tools.initialise_small_vae` makes the linear path, `--stage codec` trains both paths.

Causal: a latent frame sees its own four frames, a decoded group of four frames its own latent frame and the one before.
So a video is decoded piece by piece with a cache of one latent frame (`decode(z, before)`).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from pipeline.model.tiny_vae import DecoderOutput, DeterministicPosterior, EncoderOutput

#: frames of a group, pixels between two windows, pixels of a window
GROUP, STRIDE, WINDOW = 4, 8, 16
#: pixels of a window that lie outside of its own 8 x 8, on each side
OVERLAP = (WINDOW - STRIDE) // 2


class SmallVideoVAE(ModelMixin, ConfigMixin):
    """Lapped transform with learned corrections.

    Args:
        z_dim: latent channels C.
        encoder_dims: widths of the encoder's convolutions at 1/2, 1/4, 1/8 of the size.
        decoder_dims: widths of the decoder's at 1/8, 1/4, 1/2 and the full size.
        decoder_blocks: its residual blocks at 1/8, 1/4, 1/2.
        latents_mean, latents_std: per-channel normalisation, applied by `pipeline.model.vae`, not here (as in Wan).
    """

    #: what torch.compile takes one by one
    _repeated_blocks: ClassVar[list[str]] = ["ResidualBlock"]

    @register_to_config
    def __init__(
        self,
        z_dim: int = 48,
        encoder_dims: tuple[int, ...] = (32, 64, 96),
        decoder_dims: tuple[int, ...] = (128, 80, 40, 24),
        decoder_blocks: tuple[int, ...] = (3, 2, 1),
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scale_factor_spatial: int = STRIDE,
        scale_factor_temporal: int = GROUP,
    ) -> None:
        super().__init__()
        if latents_mean is None or latents_std is None:
            self.register_to_config(latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim)
        kernel, stride = (GROUP, WINDOW, WINDOW), (GROUP, STRIDE, STRIDE)
        self.linear_encode = nn.Conv3d(3, z_dim, kernel, stride=stride)
        self.linear_decode = nn.ConvTranspose3d(z_dim, 3, kernel, stride=stride)
        self.encoder = _encoder(z_dim, tuple(encoder_dims))
        self.decoder = _decoder(2 * z_dim, tuple(decoder_dims), tuple(decoder_blocks))
        for head in (self.encoder[-1], self.decoder[-1]):  # both paths start as the plain lapped transform
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode and decode in one pass, for training.

        Args:
            x: pixels (B, 3, 4k+1, H, W) in [-1, 1].
            noise: added to the normalised latents (B, C, k+1, H/8, W/8) before they are decoded.

        Returns:
            Decoded pixels, not clamped, and normalised latents without the noise.
        """
        z = self.encode(x).latent_dist.mode()
        mean, std = self._per_channel("latents_mean", z), self._per_channel("latents_std", z)
        disturbed = z if noise is None else z + noise * std
        return self.decode(disturbed).sample, (z - mean) / std

    def encode(self, x: Tensor) -> EncoderOutput:
        """Pixels (B, 3, 4k+1, H, W) in [-1, 1] to latents (B, C, k+1, H/8, W/8); sides are multiples of 8."""
        groups = torch.cat([x[:, :, :1].expand(-1, -1, GROUP, -1, -1), x[:, :, 1:]], dim=2)
        linear = self.linear_encode(F.pad(groups, (*(OVERLAP,) * 4, 0, 0), mode="replicate"))
        frames = groups.unflatten(2, (-1, GROUP)).transpose(1, 2).flatten(2, 3)  # (B, k+1, 12, H, W)
        corrected = self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
        return EncoderOutput(DeterministicPosterior(linear + corrected))

    def decode(self, z: Tensor, before: Tensor | None = None) -> DecoderOutput:
        """Latents (B, C, T, h, w) to pixels, not clamped.

        Args:
            before: the latent frame before `z`, (B, C, 1, h, w), where `z` continues a video. None: `z` begins it.

        Returns:
            (B, 3, 4·T - 3, 8h, 8w), or 4·T frames where `z` continues a video.
        """
        cut = OVERLAP + STRIDE
        linear = self.linear_decode(F.pad(z, (1, 1, 1, 1, 0, 0), mode="replicate"))[..., cut:-cut, cut:-cut]
        normalised = z / self._per_channel("latents_std", z)
        first = torch.zeros_like(z[:, :, :1]) if before is None else before / self._per_channel("latents_std", z)
        past = torch.cat([first, normalised[:, :, :-1]], dim=2)
        pairs = torch.cat([normalised, past], dim=1).transpose(1, 2)
        corrections = self.decoder(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])  # (B, T, 12, H, W)
        frames = linear + corrections.unflatten(2, (3, GROUP)).transpose(1, 2).flatten(2, 3)
        return DecoderOutput(frames if before is not None else frames[:, :, GROUP - 1 :])

    def _per_channel(self, name: str, like: Tensor) -> Tensor:
        return torch.tensor(self.config[name], device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)


class ResidualBlock(nn.Module):
    """x + conv(gelu(conv(gelu(x)))), 3x3 each, borders replicated."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = convolution(dim, dim), convolution(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(F.gelu(x))))


class Enlarge(nn.Module):
    """Twice the size by bilinear interpolation, then a convolution: no checkerboard."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = convolution(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    # Windows of the kernel 4 are centred on the pairs of pixels that they merge.
    kernel = 3 if stride == 1 else 4
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=1, padding_mode="replicate")


def _encoder(z_dim: int, dims: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip((3 * GROUP, *dims[:-1]), dims, strict=True):
        layers += [convolution(inputs, outputs, stride=2), ResidualBlock(outputs)]
    return nn.Sequential(*layers, nn.GELU(), convolution(dims[-1], z_dim))


def _decoder(inputs: int, dims: tuple[int, ...], blocks: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = [convolution(inputs, dims[0])]
    for dim, larger, count in zip(dims[:-1], dims[1:], blocks, strict=True):
        layers += [*(ResidualBlock(dim) for _ in range(count)), Enlarge(dim, larger)]
    return nn.Sequential(*layers, nn.GELU(), convolution(dims[-1], 3 * GROUP))
