"""What networks in bf16 compute in float32, and what they need not.

bf16 has 8 bits of precision, so a decoder that ends in it gives no more than 8 bits of a pixel. Its last layers
compute in float32 from features in bf16.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from torch import Tensor, nn

from pipeline.model.fast_codec import FastDecoder
from pipeline.model.small_vae import SmallVideoVAE
from pipeline.model.tiny_vae import TinyVideoVAE

#: rows of features of which Wan's decoder holds a copy in float32 [ours]
ROWS = 128


def set_precision(network: nn.Module) -> None:
    """Last layers in float32; Wan's nearest-neighbour upsampling, which only copies, in the network's own numbers."""
    for layer in _last_layers(network):
        layer.float().register_forward_pre_hook(_in_float32)
    if isinstance(network, AutoencoderKLWan):
        layer = network.decoder.conv_out.float()
        layer.forward = partial(_by_rows, layer.forward)
    for layer in network.modules():
        if isinstance(layer, WanUpsample):  # its own `forward` goes to float32 and back
            layer.forward = super(WanUpsample, layer).forward


def _last_layers(network: nn.Module) -> list[nn.Module]:
    """Those of the small networks whose results are pixels, or are added to them."""
    if isinstance(network, SmallVideoVAE):
        return [network.linear_decode, network.decoder[-1]]
    if isinstance(network, FastDecoder):
        return [network.linear, network.enlarge[-1]]
    if isinstance(network, TinyVideoVAE):
        return [network.decode_first, network.decode_next, network.refine_first, network.refine_next]
    return []


def _in_float32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() for value in inputs)


def _by_rows(forward: Any, x: Tensor, cache: Tensor | None = None) -> Tensor:
    """Wan's 3x3x3 convolution in float32: rows at a time, each with a neighbour on both sides."""
    parts = []
    for top in range(0, x.shape[-2], ROWS):
        rows = slice(max(0, top - 1), top + ROWS + 1)
        part = forward(x[..., rows, :].float(), None if cache is None else cache[..., rows, :].float())
        parts.append(part[..., top - rows.start :, :][..., :ROWS, :])
    return torch.cat(parts, dim=-2)
