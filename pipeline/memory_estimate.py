"""How much memory a window needs, found without weights, computing or a GPU: the model runs on PyTorch's meta device.

Tensors of the meta device have shapes and no content; `LiveBytes` counts what would live at the same time. Attention
counts as its result, as flash attention needs it. A CPU's convolutions count with the copies that oneDNN makes. What an
allocator reserves beyond that on a GPU, and the program itself, come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.live_bytes import LiveBytes
from pipeline.latent_codec import CodecName, FastCodec, FullCodec, LatentCodec
from pipeline.model.fast_codec import FastDecoder, LowResolutionEncoder
from pipeline.model.half_precision import set_precision
from pipeline.model.prompts import load_prompts
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import SPATIAL_FACTOR, TEMPORAL_FACTOR, vae_class
from pipeline.vsr_pipeline import Tiling, require_model, require_part

GIB = 2**30
#: oneDNN works on blocks of channels; an input of another number of channels is read as it lies
BLOCKED_CHANNELS = 8
#: a CPU's memory with the holes of glibc's heap, to what lives: 1.0 to 1.07 measured where encoding needs most. With
#: MALLOC_MMAP_THRESHOLD_=1048576 there are no holes, and a window takes 1.26 times as long
HEAP = 1.08


class _FlashAttention(TorchFunctionMode):
    """Attention whose table of weights never exists."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            query, _, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return function(*args, **(kwargs or {}))


class _OnCPU(LiveBytes):
    """With what oneDNN holds beside a convolution's input and result: first a copy of the input in its own layout and
    the result in that layout, then the latter and the result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.convolution.default:
            copied = args[0].nbytes if args[0].shape[1] % BLOCKED_CHANNELS == 0 else 0
            self.peak = max(self.peak, self.now + max(copied, result.nbytes))
        return result


@dataclass(frozen=True)
class WindowMemory:
    """Bytes; of each step at its peak, without `weights`."""

    #: what is there in every step
    weights: int
    encode: int
    transformer: int
    decode: int

    @property
    def peak(self) -> int:
        """Of the whole window."""
        return self.weights + max(self.encode, self.transformer, self.decode)


class MemoryEstimate:
    """The networks of a model folder, on the meta device."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        codec: CodecName = "full",
        *,
        vae_dtype: torch.dtype | None = None,
        offload: bool = False,
        device: str = "cuda",
    ) -> None:
        """
        Args:
            vae_dtype: None: as `dtype`.
            offload: only the network of a step is there.
            device: that it computes on.

        Raises:
            UserError: the folder lacks a part.
        """
        require_model(folder)
        classes: dict[str, Any] = {"vae": vae_class(folder / "vae"), "transformer": VSRTransformer}
        if codec == "fast":
            classes |= {"fast_decoder": FastDecoder}
            if (folder / "lr_encoder").is_dir():
                classes |= {"lr_encoder": LowResolutionEncoder}
        networks: dict[str, Any] = {}
        with torch.device("meta"):
            for name, network_class in classes.items():
                require_part(folder, name)
                networks[name] = network_class.from_config(network_class.load_config(folder / name))
        self._transformer = networks["transformer"]
        self._codec: LatentCodec = FullCodec(networks["vae"])
        if codec == "fast":
            self._codec = FastCodec(networks["vae"], networks.get("lr_encoder"), networks["fast_decoder"])
        vae_dtype = vae_dtype or dtype
        for name, network in networks.items():
            network.requires_grad_(False).eval()
            kept = set(network._keep_in_fp32_modules or ())
            for place, parameter in network.named_parameters():
                if not kept & set(place.split(".")):
                    parameter.data = parameter.data.to(vae_dtype if name == "vae" else dtype)
            set_precision(network)
        self._prompt = load_prompts(folder / "prompts").embed([""]).to("meta", dtype)
        self._offload = offload
        self._counter = _OnCPU if torch.device(device).type == "cpu" else LiveBytes
        self.weights = 0 if offload else sum(map(_weights, networks.values()))

    def window(self, frames: int, width: int, height: int, tiling: Tiling) -> WindowMemory:
        """Of `frames` frames of the model's output size, px."""
        multiple = SPATIAL_FACTOR * max(self._transformer.config.patch_size[1:])
        frames += -(frames - 1) % TEMPORAL_FACTOR
        whole = tuple(-(-side // multiple) * multiple for side in (height, width))

        def tile(px: int | None) -> tuple[int, int]:
            side = None if px is None else max(multiple, px // multiple * multiple)
            return tuple(length if side is None else min(side, length) for length in whole)  # type: ignore[return-value]

        latent_frames = (frames - 1) // TEMPORAL_FACTOR + 1
        channels = self._codec.vae.config.z_dim

        def latent(size: tuple[int, ...]) -> Tensor:
            return torch.empty(1, channels, latent_frames, *(s // SPATIAL_FACTOR for s in size), device="meta")

        def inputs(size: tuple[int, ...]) -> Tensor:
            places = (s // SPATIAL_FACTOR * self._codec.place_px for s in size)
            return torch.empty(1, 3, frames, *places, device="meta")

        pixels = inputs(tile(tiling.vae_tile_px))
        held = inputs(whole).nbytes  # until the window is decoded
        encode = self._peak(lambda: self._codec.encode(pixels)) + held
        noise = latent(tile(tiling.transformer_tile_px))
        t = torch.ones(1, device="meta")
        transformer = self._peak(lambda: self._transformer(noise, t, noise, self._prompt))
        transformer += held + 4 * latent(whole).nbytes
        decoded = tile(tiling.decode_tile_px or tiling.vae_tile_px)
        z, seen = latent(decoded), inputs(decoded)
        decode = self._peak(lambda: self._codec.decode(z, seen)) + held + 2 * latent(whole).nbytes
        if decoded != whole:  # the strip of tiles and the frames that they are put into
            decode += 4 * 3 * frames * whole[1] * (decoded[0] + whole[0])
        if self._offload:
            encode += _weights(self._codec.networks[0])
            transformer += _weights(self._transformer)
            decode += _weights(self._codec.networks[1])
        return WindowMemory(self.weights, encode, transformer, decode)

    def _peak(self, compute: Callable[[], Any]) -> int:
        with self._counter("meta") as live, _FlashAttention(), torch.no_grad():
            compute()
        return live.peak if self._counter is LiveBytes else round(HEAP * live.peak)


def _weights(network: nn.Module) -> int:
    """Bytes."""
    return sum(value.nbytes for value in network.parameters())
