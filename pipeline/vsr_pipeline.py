"""VSRPipeline: a low-resolution clip in, the same clip four times as large out.

    pipeline = VSRPipeline.from_pretrained("runs/demo/preference/model")
    frames = pipeline(low_resolution, seed=0).frames

A diffusers pipeline of three components (transformer, vae, prompts), and a fast codec where one was trained. Large
clips go through in overlapping tiles, which are blended with smooth weights. Long videos go through in windows, one
call each (pipeline/video_windows.py); the noise belongs to the place in the video, not to the window, so that
neighbours agree where they overlap.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from common.bit_depth import BitDepth
from common.errors import UserError
from common.scale import SCALE
from common.seeding import seeded_noise
from pipeline.colour_fix import ColourFix, fix_colour
from pipeline.latent_codec import CodecName, FastCodec, FullCodec, LatentCodec, padded_inputs
from pipeline.model.fast_codec import FastDecoder, LowResolutionEncoder
from pipeline.model.half_precision import set_precision
from pipeline.model.prompts import DEFAULT_PROMPT, NULL_PROMPT, PromptCache
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import SPATIAL_FACTOR, TEMPORAL_FACTOR, VAE, to_frames, upsample_low_resolution
from pipeline.offload import Offload
from pipeline.sampling import euler_sample
from pipeline.tiling import in_tiles

#: components of a model folder for `codec="fast"`, each made by the stage of that name; it does without the second
FAST_CODEC = ("fast_decoder", "lr_encoder")
#: what a call spends its time on
STEPS = ("upsample", "encode", "transformer", "decode", "colour")


@dataclass
class VSRResult:
    """What one call returns."""

    #: (F, 4h, 4w, 3) RGB: uint8, or uint16 holding values of 10 or 16 bits if those were asked for
    frames: np.ndarray
    #: forwards of the DiT: one per window and tile for a one-step model
    dit_evaluations: int
    #: wall time of each of STEPS
    seconds: dict[str, float] = field(default_factory=dict)


#: by which a tile must exceed its overlap: one row of DiT tokens, and the same again for rounding
MINIMAL_STRIDE_PX = 32
#: no tile is made smaller than this on its own: it would see too little [ours]
SMALLEST_TILE_PX = 256


@dataclass(frozen=True)
class Tiling:
    """Sizes in pixels of the output; None = never split.

    Overlaps of at least 128 px leave no seams [peer: SeedVR2 users]. The DiT's tiles are separate from the VAE's, whose
    convolutions need far more memory per pixel; `decode_tile_px` splits the decoder further, which needs most.

    Raises:
        UserError: an overlap that leaves no room between tiles.
    """

    transformer_tile_px: int | None = None
    vae_tile_px: int | None = None
    #: None = as `vae_tile_px`
    decode_tile_px: int | None = None
    overlap_px: int = 128

    def __post_init__(self) -> None:
        for tile in (self.transformer_tile_px, self.vae_tile_px, self.decode_tile_px):
            if tile is not None and not 0 <= self.overlap_px <= tile - MINIMAL_STRIDE_PX:
                raise UserError(
                    f"a tile of {tile} px with an overlap of {self.overlap_px} px: the tile must be at least "
                    f"{MINIMAL_STRIDE_PX} px larger"
                )

    def options(self) -> str:
        """As on the command line."""
        return (
            f"--decode-tile {self.decode_tile_px or self.vae_tile_px or 'whole'}"
            f" --vae-tile {self.vae_tile_px or 'whole'} --tile {self.transformer_tile_px or 'whole'}"
        )


def smaller_tiles(tiling: Tiling, width: int, height: int) -> Tiling | None:
    """What to try when memory was full: decoder tiles of half the side, then VAE tiles, then DiT tiles.

    Args:
        width, height: of the output, px.

    Returns:
        None where all are at SMALLEST_TILE_PX.
    """
    smallest = max(SMALLEST_TILE_PX, tiling.overlap_px + MINIMAL_STRIDE_PX)
    whole = max(width, height)
    sides = {
        "decode_tile_px": tiling.decode_tile_px or tiling.vae_tile_px or whole,
        "vae_tile_px": tiling.vae_tile_px or whole,
        "transformer_tile_px": tiling.transformer_tile_px or whole,
    }
    for name, side in sides.items():
        if side > smallest:
            return replace(tiling, **{name: max(smallest, -(-side // 2))})
    return None


class VSRPipeline(DiffusionPipeline):
    """Upscale ×4.

    Args:
        transformer, vae, prompts: the components of a model folder.
        fast_decoder, lr_encoder: what `codec="fast"` takes in the place of the VAE; None: the folder holds none.
        num_inference_steps: steps the transformer was trained for (1 after Stage I); the default of a call.
        shift: timestep shift s of the sampler.
        guidance_weight: w of v(c) + w·(v(c) - v(∅)); 0 for distilled models.
    """

    _optional_components: ClassVar[list[str]] = list(FAST_CODEC)

    def __init__(
        self,
        transformer: VSRTransformer,
        vae: VAE,
        prompts: PromptCache,
        fast_decoder: FastDecoder | None = None,
        lr_encoder: LowResolutionEncoder | None = None,
        num_inference_steps: int = 1,
        shift: float = 5.0,
        guidance_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, prompts=prompts, fast_decoder=fast_decoder, lr_encoder=lr_encoder
        )
        self.register_to_config(num_inference_steps=num_inference_steps, shift=shift, guidance_weight=guidance_weight)
        #: set: networks are in the host's memory and take turns on its device
        self.offload: Offload | None = None

    @property
    def computes_on(self) -> torch.device:
        """Where it computes."""
        return self.offload.device if self.offload else self.transformer.device

    @torch.no_grad()
    def __call__(
        self,
        low_resolution: np.ndarray | Tensor,
        *,
        prompt: str = DEFAULT_PROMPT,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_weight: float | None = None,
        tiling: Tiling = Tiling(),
        colour_fix: ColourFix = "none",
        bit_depth: BitDepth = 8,
        first_frame: int = 0,
        codec: CodecName | None = None,
        fixed_noise: bool = False,
    ) -> VSRResult:
        """Upscale one clip; `upscale_video` (pipeline/video_windows.py) streams longer videos through here, `Session`
        those whose frames come bit by bit.

        Args:
            low_resolution: uint8, or uint16 in 0…65535, (F, h, w, 3) RGB, any F and size.
            seed: of the noise; the result is a function of the clip and this.
            first_frame: number of the clip's first frame in its video; the noise depends on it.
            codec: `full` is the VAE, `fast` the networks trained to stand in for it; None: `fast` where they are.
            fixed_noise: every latent frame of the video draws the noise of the first one.

        Raises:
            ValueError: another dtype or shape.
            UserError: `codec="fast"` of a model without it.
        """
        frames = torch.as_tensor(np.ascontiguousarray(low_resolution))
        known = frames.dtype in (torch.uint8, torch.uint16)
        if frames.ndim != 4 or frames.shape[3] != 3 or not known or len(frames) == 0:
            raise ValueError(f"expected uint8 or uint16 (F, h, w, 3), got {frames.dtype} {tuple(frames.shape)}")
        run = _Run(
            self,
            prompt,
            seed,
            self.config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            self.config.guidance_weight if guidance_weight is None else guidance_weight,
            tiling,
            self.codec(codec),
            fixed_noise,
        )
        result = run.frames(frames, run.clip(frames, first_frame), colour_fix, bit_depth)
        return VSRResult(result, run.dit_evaluations, run.seconds)

    def codec(self, name: CodecName | None = None) -> LatentCodec:
        """What encodes and decodes; None: the fast codec if there is one.

        Raises:
            UserError: the model holds no fast decoder.
        """
        if name == "full" or (name is None and self.fast_decoder is None):
            return FullCodec(self.vae)
        if self.fast_decoder is None:
            raise UserError(_without("the model", "fast_decoder"))
        return FastCodec(self.vae, self.lr_encoder, self.fast_decoder)


class _Run:
    """One call: its settings, counters and clocks."""

    def __init__(
        self,
        pipeline: VSRPipeline,
        prompt: str,
        seed: int,
        steps: int,
        guidance_weight: float,
        tiling: Tiling,
        codec: LatentCodec,
        fixed_noise: bool,
    ) -> None:
        self._fixed_noise = fixed_noise
        self._pipeline, self._seed, self._steps, self._tiling, self._codec = pipeline, seed, steps, tiling, codec
        self._guidance_weight = guidance_weight
        self._device = device = pipeline.computes_on
        self._prompt = pipeline.prompts.embed([prompt]).to(device)
        self._null_prompt = pipeline.prompts.embed([NULL_PROMPT]).to(device) if guidance_weight else None
        self.dit_evaluations = 0
        self.seconds = dict.fromkeys(STEPS, 0.0)

    def clip(self, frames: Tensor, first_frame: int) -> Tensor:
        """uint8 or uint16 (F, h, w, 3) to float32 pixels (3, F, 4h, 4w) in [-1, 1], on the device."""
        count = len(frames)
        began = time.perf_counter()
        height, width = (SCALE * side for side in frames.shape[1:3])
        inputs = padded_inputs(self._codec, frames, self._multiple())
        began = self.lap("upsample", began)
        encoder, decoder = self._codec.networks
        with self._turn(encoder):
            z_lr = self._encode(inputs)
        began = self.lap("encode", began)
        with self._turn(self._pipeline.transformer):
            z = self._transform(z_lr, first_frame)
        began = self.lap("transformer", began)
        with self._turn(decoder):
            decoded = self._decode(z, inputs)[0]
        self.lap("decode", began)
        return decoded[:, :count, :height, :width]

    def frames(self, source: Tensor, pixels: Tensor, colour_fix: ColourFix, bit_depth: BitDepth) -> np.ndarray:
        """What `clip` made of `source`, recoloured and rounded: (F, 4h, 4w, 3) of `bit_depth` bits.

        One frame at a time, where the pixels are: the device's memory holds no second clip.
        """
        began = time.perf_counter()
        pinned = pixels.device.type == "cuda"  # copied while the next frame is computed
        dtype = torch.uint8 if bit_depth == 8 else torch.uint16
        result = torch.empty((*pixels.shape[1:], 3), dtype=dtype, pin_memory=pinned)
        for number, frame in enumerate(source):
            recoloured = pixels[:, number : number + 1]
            if colour_fix != "none":
                low = upsample_low_resolution(frame[None].to(pixels.device))
                recoloured = fix_colour(recoloured, low, colour_fix)
            result[number].copy_(to_frames(recoloured, bit_depth)[0], non_blocking=pinned)
        self.lap("colour", began)
        return result.numpy()

    def _turn(self, network: torch.nn.Module) -> AbstractContextManager[None]:
        offload = self._pipeline.offload
        return offload.turn(network) if offload else nullcontext()

    def _multiple(self) -> int:
        patch = self._pipeline.transformer.config.patch_size
        return SPATIAL_FACTOR * max(patch[1], patch[2])

    def lap(self, part: str, began: float) -> float:
        """Add the time since `began` to a part; returns now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[part] += now - began
        return now

    def _encode(self, inputs: Tensor) -> Tensor:
        tile = self._tile(self._tiling.vae_tile_px)

        def encode(rows: slice, columns: slice) -> Tensor:
            return self._codec.encode(self._inputs_at(inputs, rows, columns))

        return in_tiles(self._codec.latent_shape(inputs), tile, self._overlap(), encode)

    def _decode(self, z: Tensor, inputs: Tensor) -> Tensor:
        frames = (z.shape[2] - 1) * TEMPORAL_FACTOR + 1
        shape = (3, frames, z.shape[3] * SPATIAL_FACTOR, z.shape[4] * SPATIAL_FACTOR)
        tile = self._tile(self._tiling.decode_tile_px or self._tiling.vae_tile_px)
        tile_px = None if tile is None else tile * SPATIAL_FACTOR

        def decode(rows: slice, columns: slice) -> Tensor:
            rows, columns = _latent(rows), _latent(columns)
            return self._codec.decode(z[..., rows, columns], self._inputs_at(inputs, rows, columns))

        return in_tiles(shape, tile_px, self._overlap() * SPATIAL_FACTOR, decode)

    def _inputs_at(self, inputs: Tensor, rows: slice, columns: slice) -> Tensor:
        """Those of some latent places."""
        px = self._codec.place_px
        return inputs[..., rows.start * px : rows.stop * px, columns.start * px : columns.stop * px]

    def _transform(self, z_lr: Tensor, first_frame: int) -> Tensor:
        noise = self._noise(z_lr.shape[1:], first_frame).to(z_lr.device)
        tile = self._tile(self._tiling.transformer_tile_px)

        def sample(rows: slice, columns: slice) -> Tensor:
            return euler_sample(
                self._velocity,
                noise[..., rows, columns],
                z_lr[..., rows, columns],
                self._prompt,
                steps=self._steps,
                shift=self._pipeline.config.shift,
                null_prompt=self._null_prompt,
                guidance_weight=self._guidance_weight,
            )

        return in_tiles(tuple(z_lr.shape[1:]), tile, self._overlap(), sample)

    def _noise(self, shape: tuple[int, ...], first_frame: int) -> Tensor:
        """(1, C, T, h, w); a latent frame's noise belongs to its place in the video.

        The word "film" is part of the seed: another one would change every result.
        """
        channels, latent_frames, height, width = shape
        rows = [
            seeded_noise((channels, height, width), self._seed, "film", 0 if self._fixed_noise else place)
            for place in range(first_frame, first_frame + TEMPORAL_FACTOR * latent_frames, TEMPORAL_FACTOR)
        ]
        return torch.stack(rows, dim=1)[None]

    def _velocity(self, z_t: Tensor, t: Tensor, z_lr: Tensor, prompt: Tensor) -> Tensor:
        velocity = self._pipeline.transformer(z_t, t, z_lr, prompt).velocity
        self.dit_evaluations += 1
        return velocity

    def _tile(self, pixels: int | None) -> int | None:
        """A tile size in latent cells, a multiple of the patch."""
        if pixels is None:
            return None
        multiple = self._multiple()
        return max(multiple, pixels // multiple * multiple) // SPATIAL_FACTOR

    def _overlap(self) -> int:
        """In latent cells, a multiple of the patch, not less than asked for."""
        multiple = self._multiple()
        return -(-self._tiling.overlap_px // multiple) * multiple // SPATIAL_FACTOR


def open_pipeline(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
    *,
    offload: bool = False,
) -> VSRPipeline:
    """`VSRPipeline.from_pretrained` with errors for people.

    Args:
        dtype: of all components, or by component's name, `default` standing for the others.
        offload: networks stay in the host's memory and take turns on the device.

    Raises:
        UserError: no model folder there, or one that lacks a part.
    """
    folder = Path(folder)
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch sees no GPU here; choose --device cpu")
    if str(device).startswith("cuda:") and torch.device(device).index >= torch.cuda.device_count():
        raise UserError(f"{device}: PyTorch sees {torch.cuda.device_count()} GPUs here, numbered from 0")
    require_model(folder)
    disable_progress_bar()  # of loading three components
    pipeline = VSRPipeline.from_pretrained(folder, use_safetensors=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if component is not None:
            component.requires_grad_(False).eval()
            set_precision(component)
    if offload:
        pipeline.offload = Offload(device)
        return pipeline
    return pipeline.to(device)


def require_model(folder: Path) -> None:
    """
    Raises:
        UserError: it is no model folder, or lacks a part that all have.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"no model in {folder}: model_index.json is missing; give a folder that training exported")
    for part in ("transformer", "vae", "prompts"):
        require_part(folder, part)


def require_part(folder: Path, part: str) -> None:
    """
    Raises:
        UserError: the model folder holds no weights of that component.
    """
    if not list((folder / part).glob("*.safetensors")):
        if part in FAST_CODEC:
            raise UserError(_without(f"the model in {folder}", part))
        raise UserError(f"the model in {folder} is incomplete: {part}/ holds no .safetensors; export it again")


def _without(model: str, part: str) -> str:
    return f"{model} holds no {part}: train one with trainer/run.py --stage {part}, or take --codec full"


def _latent(pixels: slice) -> slice:
    return slice(pixels.start // SPATIAL_FACTOR, pixels.stop // SPATIAL_FACTOR)
