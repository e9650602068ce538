"""DOVER's network with the names and shapes of its published weights, for python -m metrics.convert_dover.

Written from the papers and from the layout of `DOVER.pth`; the authors' code is for non-commercial use and is not part
of this repository. Technical view: Video Swin-T (Liu et al., "Video Swin Transformer", 2022) with FAST-VQA's gated
relative position biases (Wu et al., "FAST-VQA", 2022). Aesthetic view: ConvNeXt-T (Liu et al., "A ConvNet for the
2020s", 2022) with kernels 2 and 3 frames long. Each ends in a head of two 1×1×1 convolutions and the mean over all
places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.video.swin_transformer import (
    ShiftedWindowAttention3d,
    SwinTransformer3d,
    shifted_window_attention_3d,
)

#: fragments of a view, by rows and columns
_GRID = 7
_WINDOW = (8, 7, 7)
_DEPTHS, _HEADS = [2, 2, 6, 2], [3, 6, 12, 24]
#: channels of ConvNeXt's stages, blocks in each, and frames in the kernel of the first, second, third … block
_WIDTHS, _BLOCKS, _KERNELS = (96, 192, 384, 768), (3, 3, 9, 3), (1, 3, 1)
#: names of the published weights -> torchvision's
_RENAMED = (
    (r"layers\.(\d)\.blocks\.", lambda found: f"features.{2 * int(found[1])}."),
    (r"layers\.(\d)\.downsample\.", lambda found: f"features.{2 * int(found[1]) + 1}."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


class DoverNetwork(nn.Module):
    """Both backbones and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.technical_backbone = TechnicalBackbone()
        self.aesthetic_backbone = AestheticBackbone()
        self.technical_head, self.aesthetic_head = Head(), Head()

    def forward(self, aesthetic: Tensor, technical: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N,) of views (N, 3, 32, 224, 224), normalised: aesthetic, technical."""
        scores = self.aesthetic_head(self.aesthetic_backbone(aesthetic))
        return scores, self.technical_head(self.technical_backbone(technical))

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of `DOVER.pth`.

        Raises:
            RuntimeError: a name is missing or unknown, or a shape differs.
        """
        renamed = {}
        for name, tensor in state.items():
            room, _, rest = name.partition(".")
            if room == "technical_backbone":
                for pattern, replacement in _RENAMED:
                    rest = re.sub(pattern, replacement, rest)  # type: ignore[arg-type]
            renamed[f"{room}.{rest}"] = tensor
        self.load_state_dict(renamed)


class Head(nn.Module):
    """768 channels to one score."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_hid = nn.Conv3d(_WIDTHS[-1], 64, 1)
        self.fc_last = nn.Conv3d(64, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc_last(functional.gelu(self.fc_hid(features))).mean((1, 2, 3, 4))


class TechnicalBackbone(SwinTransformer3d):
    """Video Swin-T whose first three stages know which tokens lie in one fragment."""

    def __init__(self) -> None:
        super().__init__([2, 4, 4], 96, _DEPTHS, _HEADS, list(_WINDOW), stochastic_depth_prob=0.0, block=_block)
        del self.head, self.avgpool

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, T, 224, 224) to (N, 768, T/2, 7, 7)."""
        return self.norm(self.features(self.patch_embed(x))).permute(0, 4, 1, 2, 3)


def _block(dim: int, *arguments: Any, attn_layer: Any, **options: Any) -> SwinTransformerBlock:
    attention = partial(FragmentAttention, fragments=dim < _WIDTHS[-1])
    return SwinTransformerBlock(dim, *arguments, attn_layer=attention, **options)


class FragmentAttention(ShiftedWindowAttention3d):
    """Attention in windows with two tables of biases: b = g·relative + (1 - g)·fragment.

    g counts the fragments between two tokens, rows and columns added: 0 within one.
    """

    def __init__(self, *arguments: Any, fragments: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if fragments:
            self.fragment_position_bias_table = nn.Parameter(torch.zeros_like(self.relative_position_bias_table))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:4]
        window = [min(pair) for pair in zip(size, self.window_size, strict=True)]
        shift = [
            0 if length <= side else step for length, side, step in zip(size, window, self.shift_size, strict=True)
        ]
        bias = self.get_relative_position_bias(window)
        if hasattr(self, "fragment_position_bias_table"):
            index = self.relative_position_index[: bias.shape[-1], : bias.shape[-1]]
            within = self.fragment_position_bias_table[index].permute(2, 0, 1)
            gate = fragments_between(tuple(size), window, shift)[:, None].to(x)
            bias = (gate * bias + (1 - gate) * within).repeat(len(x), 1, 1, 1)
        weights = (self.qkv.weight, self.proj.weight, bias, window, self.num_heads, shift)
        return shifted_window_attention_3d(
            x, *weights, qkv_bias=self.qkv.bias, proj_bias=self.proj.bias, training=False
        )


def fragments_between(size: tuple[int, ...], window: list[int], shift: list[int]) -> Tensor:
    """|Δrow| + |Δcolumn| of the fragments of each two tokens of a window: (windows, N, N).

    Args:
        size: tokens in time, height and width.
        shift: of the windows.
    """
    rows, columns = (torch.arange(length) * _GRID // length for length in size[1:])
    places = torch.stack(torch.broadcast_tensors(rows[:, None], columns), -1).expand(*size, 2)
    places = torch.roll(places, [-step for step in shift], (0, 1, 2))
    for axis, side in enumerate(window):
        places = places.unflatten(2 * axis, (-1, side))
    tokens = places.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, window[0] * window[1] * window[2], 2)
    return (tokens[:, :, None] - tokens[:, None]).abs().sum(-1)


class AestheticBackbone(nn.Module):
    """ConvNeXt-T, inflated in time."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv3d(3, _WIDTHS[0], (2, 4, 4), (2, 4, 4)), ChannelNorm(_WIDTHS[0]))
        halvings = [nn.Sequential(ChannelNorm(a), nn.Conv3d(a, b, (1, 2, 2), (1, 2, 2))) for a, b in pairwise(_WIDTHS)]
        self.downsample_layers = nn.ModuleList([stem, *halvings])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNextBlock(width, _KERNELS[index % len(_KERNELS)]) for index in range(count)))
            for width, count in zip(_WIDTHS, _BLOCKS, strict=True)
        )
        self.norm = ChannelNorm(_WIDTHS[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, T, 224, 224) to (N, 768, T/2, 7, 7)."""
        for halving, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(halving(x))
        return self.norm(x)


class ConvNextBlock(nn.Module):
    """Depthwise convolution and an MLP of four times the width, scaled by `gamma`, beside a skip."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv3d(width, width, (frames, 7, 7), padding=(frames // 2, 3, 3), groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm(self.dwconv(x).permute(0, 2, 3, 4, 1))
        return x + (self.gamma * self.pwconv2(functional.gelu(self.pwconv1(inside)))).permute(0, 4, 1, 2, 3)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, T, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
