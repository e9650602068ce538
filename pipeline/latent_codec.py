"""What turns a clip into latents and back within the pipeline: the VAE, or the fast codec of the model folder.

Both work on `inputs` made of the LR clip. One latent place is `place_px` x `place_px` pixels of them, so that tiles are
cut from latents and inputs alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.fast_codec import LR_PIXELS, FastDecoder, LowResolutionEncoder, decode_streaming, encode_streaming
from pipeline.model.vae import (
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    VAE,
    decode_latents,
    encode_video,
    enlarge,
    latent_shape,
    to_pixels,
    upsample_low_resolution,
)

#: what `--codec` takes
CodecName = Literal["full", "fast"]


@dataclass(frozen=True)
class FullCodec:
    """The VAE, which sees the clip enlarged in pixels."""

    vae: VAE
    place_px: ClassVar[int] = SPATIAL_FACTOR

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """What encodes, what decodes."""
        return self.vae, self.vae

    def inputs(self, frames: np.ndarray | Tensor) -> Tensor:
        """uint8 or uint16 (F, h, w, 3) to (3, F, 4h, 4w) in [-1, 1]."""
        return upsample_low_resolution(frames)

    def latent_shape(self, inputs: Tensor) -> tuple[int, int, int, int]:
        """(C, T, h, w) of the latent of inputs (B, 3, F, …)."""
        return latent_shape(self.vae, *inputs.shape[2:])

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, 3, F, …) to z_LR (B, C, T, h, w), normalised, float32."""
        return encode_video(self.vae, inputs)

    def decode(self, z: Tensor, inputs: Tensor) -> Tensor:
        """Latents and the inputs of the same places to pixels (B, 3, F, 8h, 8w), float32 in [-1, 1]."""
        return decode_latents(self.vae, z)


@dataclass(frozen=True)
class FastCodec:
    """The networks that the model folder holds beside its VAE; both see the LR clip, latent frame by latent frame.

    Without an encoder the VAE's own one sees the enlarged clip.
    """

    vae: VAE
    encoder: LowResolutionEncoder | None
    decoder: FastDecoder
    place_px: ClassVar[int] = LR_PIXELS

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """As `FullCodec.networks`."""
        return self.encoder or self.vae, self.decoder

    def inputs(self, frames: np.ndarray | Tensor) -> Tensor:
        """uint8 or uint16 (F, h, w, 3) to (3, F, h, w) in [-1, 1]."""
        return to_pixels(frames)

    def latent_shape(self, inputs: Tensor) -> tuple[int, int, int, int]:
        """As `FullCodec.latent_shape`."""
        enlarged = (side * SPATIAL_FACTOR // LR_PIXELS for side in inputs.shape[3:])
        return latent_shape(self.vae, inputs.shape[2], *enlarged)

    def encode(self, inputs: Tensor) -> Tensor:
        """As `FullCodec.encode`."""
        if self.encoder is None:
            return encode_video(self.vae, enlarge(inputs))
        return encode_streaming(self.encoder, inputs)

    def decode(self, z: Tensor, inputs: Tensor) -> Tensor:
        """As `FullCodec.decode`."""
        return decode_streaming(self.decoder, z, inputs)


LatentCodec: TypeAlias = FullCodec | FastCodec


def padded_inputs(codec: LatentCodec, frames: Tensor, multiple: int) -> Tensor:
    """Inputs of (F, h, w, 3) frames (1, 3, F', …): 4k + 1 frames, whose latent's pixels are multiples of `multiple`."""
    return _mirror(codec.inputs(_repeat_last(frames)), multiple * codec.place_px // SPATIAL_FACTOR)[None]


def _repeat_last(frames: Tensor) -> Tensor:
    """(F, h, w, 3) to 4k + 1 frames."""
    missing = -(len(frames) - 1) % TEMPORAL_FACTOR
    return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames


def _mirror(pixels: Tensor, multiple: int) -> Tensor:
    """(3, F, H, W) to sides that are multiples."""
    bottom, right = -pixels.shape[2] % multiple, -pixels.shape[3] % multiple
    if not (bottom or right):
        return pixels
    mode = "reflect" if bottom < pixels.shape[2] and right < pixels.shape[3] else "replicate"
    return F.pad(pixels, (0, right, 0, bottom), mode=mode)
