"""The fast codec of a given VAE: a decoder that sees the LR clip, and an encoder that goes from LR pixels to z_LR.

    decoder: z (B, C, T, h, w), LR (B, 3, 4T - 3, 2h, 2w)  ->  pixels (B, 3, 4T - 3, 8h, 8w)
    encoder: LR                                             ->  z_LR (B, C, T, h, w)

Latents are normalised, pixels lie in [-1, 1]. Most of the work is done at the size of the latent, on groups of four
frames; LR enters there with its pixels unshuffled. The encoder never sees an enlarged frame.

Causal: a latent frame sees its own group of frames and, through memory blocks, those before. A memory block keeps its
input of one latent frame, which is all that a video needs to be continued (`continued`). Trained by
`--stage fast_decoder` and `--stage lr_encoder`. With the widths of a small VAE's decoder, the decoder begins as exactly
that one (`start_as`): what LR adds is then learned on top.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from pipeline.model.small_vae import (
    GROUP,
    OVERLAP,
    STRIDE,
    WINDOW,
    Enlarge,
    ResidualBlock,
    SmallVideoVAE,
    convolution,
    per_channel,
)

#: LR pixels along a side of one latent place
LR_PIXELS = 2
#: their values in a group of frames
LR_CHANNELS = 3 * GROUP * LR_PIXELS**2

#: the last latent frame's input of each memory block, (B, 1, D, h, w)
Memory: TypeAlias = list[Tensor]


class MemoryBlock(nn.Module):
    """x + conv(gelu(conv(gelu([x, x of the latent frame before])))), 3x3 each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = convolution(2 * dim, dim), convolution(dim, dim)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(F.gelu(torch.cat([x, before], dim=1)))))


class Trunk(nn.Module):
    """A convolution, then memory blocks, at the size of the latent."""

    def __init__(self, inputs: int, dim: int, blocks: int) -> None:
        super().__init__()
        self.stem = convolution(inputs, dim)
        self.blocks = nn.ModuleList(MemoryBlock(dim) for _ in range(blocks))

    def forward(self, x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """(B, T, inputs, h, w) to features (B, T, D, h, w), and the memory after the last latent frame."""
        size = x.shape[:2]
        x = self.stem(x.flatten(0, 1)).unflatten(0, size)
        after = []
        for index, block in enumerate(self.blocks):
            first = torch.zeros_like(x[:, :1]) if memory is None else memory[index]
            before = torch.cat([first, x[:, :-1]], dim=1)
            after.append(x[:, -1:])
            x = block(x.flatten(0, 1), before.flatten(0, 1)).unflatten(0, size)
        return x, after


class FastDecoder(ModelMixin, ConfigMixin):
    """Latents and LR pixels to pixels: a lapped linear transform of the latent plus convolutions.

    Args:
        z_dim: latent channels C.
        dims: widths at 1/8, 1/4, 1/2 and the full size.
        blocks: memory blocks at 1/8, residual blocks at 1/4 and 1/2.
        latents_mean, latents_std: per channel, as the VAE has them; the linear transform sees z·std + mean.
    """

    #: what torch.compile takes one by one
    _repeated_blocks: ClassVar[list[str]] = ["MemoryBlock", "ResidualBlock"]

    @register_to_config
    def __init__(
        self,
        z_dim: int = 16,
        dims: tuple[int, ...] = (256, 128, 64, 32),
        blocks: tuple[int, ...] = (6, 2, 1),
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        if latents_mean is None or latents_std is None:
            self.register_to_config(latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim)
        self.linear = nn.ConvTranspose3d(z_dim, 3, (GROUP, WINDOW, WINDOW), stride=(GROUP, STRIDE, STRIDE))
        self.trunk = Trunk(2 * z_dim + LR_CHANNELS, dims[0], blocks[0])
        layers: list[nn.Module] = [Enlarge(dims[0], dims[1])]
        for dim, larger, count in zip(dims[1:-1], dims[2:], blocks[1:], strict=True):
            layers += [*(ResidualBlock(dim) for _ in range(count)), Enlarge(dim, larger)]
        self.enlarge = nn.Sequential(*layers, nn.GELU(), convolution(dims[-1], 3 * GROUP))

    def forward(self, z: Tensor, low_resolution: Tensor) -> Tensor:
        """Pixels (B, 3, 4T - 3, 8h, 8w) of a video's beginning, not clamped."""
        return self.continued(z, low_resolution, None)[0]

    def continued(self, z: Tensor, low_resolution: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Decode a part of a video.

        Args:
            z: (B, C, T, h, w).
            low_resolution: (B, 3, 4T, 2h, 2w), or 4T - 3 frames where the video begins.
            memory: what the part before returned; None: the video begins.

        Returns:
            Pixels (B, 3, 4T or 4T - 3, 8h, 8w), and the memory for the next part.
        """
        z = z.to(self.dtype)
        std = per_channel(self, "latents_std", z)
        raw = z * std + per_channel(self, "latents_mean", z)
        now = (raw / std).transpose(1, 2)
        first, memory_of_blocks = (torch.zeros_like(now[:, :1]), None) if memory is None else (memory[0], memory[1:])
        before = torch.cat([first, now[:, :-1]], dim=1)
        unshuffled = grouped(low_resolution.to(self.dtype), begins=memory is None)
        seen = torch.cat([now, before, unshuffled], dim=2).to(self.trunk.stem.weight.dtype)
        features, after = self.trunk(seen, memory_of_blocks)
        size = features.shape[:2]
        added = self.enlarge(features.flatten(0, 1)).unflatten(0, size).unflatten(2, (3, GROUP))
        cut = OVERLAP + STRIDE
        linear = self.linear(F.pad(raw, (1, 1, 1, 1, 0, 0), mode="replicate"))[..., cut:-cut, cut:-cut]
        frames = linear + added.transpose(1, 2).flatten(2, 3)
        return (frames[:, :, GROUP - 1 :] if memory is None else frames), [now[:, -1:], *after]

    @torch.no_grad()
    def start_as(self, vae: SmallVideoVAE) -> None:
        """Begin as the decoder of a small VAE where it has the same widths and blocks, else as its linear path.

        LR adds nothing yet.
        """
        self.linear.load_state_dict(vae.linear_decode.state_dict())
        ours, theirs = (
            (tuple(net.config[a]), tuple(net.config[b]))
            for net, a, b in ((self, "dims", "blocks"), (vae, "decoder_dims", "decoder_blocks"))
        )
        if ours != theirs:
            nn.init.zeros_(self.enlarge[-1].weight)
            nn.init.zeros_(self.enlarge[-1].bias)
            return
        stem, *layers = vae.decoder
        blocks, rest = layers[: len(self.trunk.blocks)], layers[len(self.trunk.blocks) :]
        _widen(self.trunk.stem, stem)
        for block, like in zip(self.trunk.blocks, blocks, strict=True):
            _widen(block.first, like.first)
            block.second.load_state_dict(like.second.state_dict())
        self.enlarge.load_state_dict(nn.Sequential(*rest).state_dict())


def _widen(layer: nn.Conv2d, like: nn.Conv2d) -> None:
    """Do as `like`; the inputs that it lacks count for nothing."""
    nn.init.zeros_(layer.weight)
    layer.weight[:, : like.in_channels] = like.weight
    layer.bias.copy_(like.bias)  # type: ignore[union-attr]


class LowResolutionEncoder(ModelMixin, ConfigMixin):
    """LR pixels to z_LR, all at the size of the latent: a linear filter plus convolutions.

    Args:
        z_dim: latent channels C.
        dim: width.
        blocks: memory blocks.
    """

    _repeated_blocks: ClassVar[list[str]] = ["MemoryBlock"]

    @register_to_config
    def __init__(self, z_dim: int = 16, dim: int = 192, blocks: int = 4) -> None:
        super().__init__()
        self.linear = convolution(LR_CHANNELS, z_dim)
        self.trunk = Trunk(LR_CHANNELS, dim, blocks)
        self.head = nn.Sequential(nn.GELU(), convolution(dim, z_dim))

    def forward(self, low_resolution: Tensor) -> Tensor:
        """(B, 3, 4T - 3, 2h, 2w) to (B, C, T, h, w)."""
        return self.continued(low_resolution, None)[0]

    def continued(self, low_resolution: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Encode a part of a video; arguments as in `FastDecoder.continued`."""
        unshuffled = grouped(low_resolution.to(self.dtype), begins=memory is None)
        features, after = self.trunk(unshuffled, memory)
        z = self.linear(unshuffled.flatten(0, 1)) + self.head(features.flatten(0, 1))
        return z.unflatten(0, features.shape[:2]).transpose(1, 2), after


def grouped(low_resolution: Tensor, *, begins: bool) -> Tensor:
    """LR (B, 3, F, 2h, 2w) to (B, T, 48, h, w): four frames in a group; a video's first frame fills its own."""
    if begins:
        first = low_resolution[:, :, :1].expand(-1, -1, GROUP - 1, -1, -1)
        low_resolution = torch.cat([first, low_resolution], dim=2)
    groups = low_resolution.unflatten(2, (-1, GROUP)).transpose(1, 2).flatten(2, 3)
    return F.pixel_unshuffle(groups, LR_PIXELS)


def frames_of(low_resolution: Tensor, latent_frame: int) -> Tensor:
    """The LR frames of one latent frame of a video: (B, 3, 4 or 1, H, W)."""
    end = GROUP * latent_frame + 1
    return low_resolution[:, :, max(0, end - GROUP) : end]


@torch.no_grad()
def decode_streaming(decoder: FastDecoder, z: Tensor, low_resolution: Tensor) -> Tensor:
    """Normalised latents and LR pixels of a video's beginning to pixels, float32 in [-1, 1], (B, 3, 4T - 3, 8h, 8w).

    One latent frame after the other: no more is held than one needs, besides the result.
    """
    z, low_resolution = z.to(decoder.device), low_resolution.to(decoder.device)
    batch, _, latent_frames, height, width = z.shape
    pixels = z.new_empty(batch, 3, GROUP * (latent_frames - 1) + 1, STRIDE * height, STRIDE * width).float()
    memory: Memory | None = None
    for index in range(latent_frames):
        part, memory = decoder.continued(z[:, :, index : index + 1], frames_of(low_resolution, index), memory)
        frames_of(pixels, index).copy_(part.float().clamp(-1, 1))
    return pixels


@torch.no_grad()
def encode_streaming(encoder: LowResolutionEncoder, low_resolution: Tensor) -> Tensor:
    """LR pixels (B, 3, 4k + 1, 2h, 2w) to normalised latents, float32, (B, C, k + 1, h, w); one by one as well."""
    low_resolution = low_resolution.to(encoder.device)
    parts: list[Tensor] = []
    memory: Memory | None = None
    for index in range((low_resolution.shape[2] - 1) // GROUP + 1):
        part, memory = encoder.continued(frames_of(low_resolution, index), memory)
        parts.append(part.float())
    return torch.cat(parts, dim=2)
