"""Upscale a video, ×4 or to any size.

    python -m pipeline.upscale in.mp4 out.mp4 --model MODEL_DIR [--scale 2 | --height 2160 | --size 3840x2160]

The video streams through in windows that overlap and are cross-faded, cut at scene changes (pipeline/video_windows.py).
Sound and frame rate are kept. The output is written atomically. Run the command again to resume a killed job.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from common.atomic import write_atomic
from common.command_line import exit_on_sigterm
from common.errors import UserError, run_command
from common.progress import progress
from common.scale import SCALE
from common.scene_cuts import CONTEXT
from common.video_io import OUTPUT_SUFFIXES, VideoInfo, VideoWriter, probe, read_frames
from pipeline.model.attention import set_attention
from pipeline.model.config import Attention
from pipeline.model.prompts import DEFAULT_PROMPT
from pipeline.model.vae import to_frames, upsample_low_resolution
from pipeline.output_size import OutputSize, choose_size, parse_size
from pipeline.resumable_video import VideoParts
from pipeline.video_windows import Place, Windows, upscale_video
from pipeline.vsr_pipeline import Tiling, open_pipeline


def with_model(
    frames: Iterator[np.ndarray], first: int, arguments: argparse.Namespace, statistics: dict[str, float]
) -> Iterator[tuple[np.ndarray, Place | None]]:
    """`upscale_video` with the command's options; the model is opened before anything is returned."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    pipeline = open_pipeline(arguments.model, arguments.device, dtype)
    set_attention(pipeline.transformer, arguments.attention)
    return upscale_video(
        pipeline,
        frames,
        arguments.windows,
        first=first,
        context=min(first, CONTEXT),
        statistics=statistics,
        prompt=arguments.prompt,
        seed=arguments.seed,
        num_inference_steps=arguments.steps,
        guidance_weight=arguments.guidance,
        colour_fix=arguments.colour_fix,
        bit_depth=arguments.bit_depth,
        tiling=arguments.tiling,
    )


def with_bicubic(
    frames: Iterator[np.ndarray], first: int, arguments: argparse.Namespace, statistics: dict[str, float]
) -> Iterator[tuple[np.ndarray, Place | None]]:
    """Frames enlarged as for z_LR, one by one."""
    statistics["dit_evaluations"] = 0
    for number, frame in enumerate(itertools.islice(frames, min(first, CONTEXT), None), first):
        yield (to_frames(upsample_low_resolution(frame[None]), arguments.bit_depth).numpy(), Place(number + 1, 0))


def main() -> None:
    exit_on_sigterm()  # the partial file is removed
    arguments = _arguments()
    info = probe(arguments.input)
    arguments.windows = Windows(arguments.window, arguments.overlap)
    arguments.tiling = Tiling(
        transformer_tile_px=arguments.tile,
        vae_tile_px=arguments.vae_tile,
        decode_tile_px=arguments.decode_tile,
        overlap_px=arguments.tile_overlap,
    )
    size = choose_size(
        info.width,
        info.height,
        info.sample_aspect_ratio,
        scale=arguments.scale,
        lines=arguments.height,
        size=arguments.size,
        max_size=arguments.max_size,
    )
    if arguments.output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise UserError(f"cannot write {arguments.output}: choose one of {', '.join(OUTPUT_SUFFIXES)}")
    began = time.perf_counter()
    parts = VideoParts(arguments.output, _job(arguments), arguments.part_frames)
    if parts.refused:
        print(f"starting over: {parts.refused[0]}", file=sys.stderr)
    elif parts.complete:
        print(f"resuming after {parts.frames} frames", file=sys.stderr)
    try:
        statistics = parts.statistics
        if parts.place is not None:
            _write_parts(parts, parts.place, info, size, arguments, statistics)
        parts.finish(None if arguments.start or arguments.frames else arguments.input)
    except torch.cuda.OutOfMemoryError:
        raise UserError(
            "the GPU's memory is full; try --decode-tile 512, then --vae-tile 768 or a smaller --window"
        ) from None
    finally:
        parts.leave()
    record = {
        "input": str(arguments.input),
        "model": "bicubic" if arguments.bicubic else str(arguments.model),
        "seed": arguments.seed,
        "frames": parts.frames,
        "width": size.output[0],
        "height": size.output[1],
        "seconds": round(time.perf_counter() - began, 3),
        **{name: round(value, 3) for name, value in statistics.items()},
        "device": arguments.device,
    }
    if arguments.stats:
        write_atomic(arguments.stats, json.dumps(record, indent=2) + "\n")
    print(f"{arguments.output}: {parts.frames} frames of {record['width']}x{record['height']} in {record['seconds']} s")


def _write_parts(
    parts: VideoParts,
    place: Place,
    info: VideoInfo,
    size: OutputSize,
    arguments: argparse.Namespace,
    statistics: dict[str, float],
) -> None:
    """Upscale what is missing, from `place` on."""
    total = info.estimated_frames and max(info.estimated_frames - arguments.start, 0)
    wanted = None if arguments.frames is None else arguments.frames - place.start
    if arguments.frames is not None:
        total = min(arguments.frames, total or arguments.frames)
    context = min(place.start, CONTEXT)  # frames before it, in which scene cuts are looked for
    first, count = arguments.start + place.start - context, wanted and wanted + context
    frames = read_frames(arguments.input, first, count, size.model_input)
    enlarge = with_bicubic if arguments.bicubic else with_model
    clips = enlarge(frames, place.start, arguments, statistics)  # opens the model, so before any file
    open_writer = partial(
        VideoWriter,
        width=size.model_input[0] * SCALE,
        height=size.model_input[1] * SCALE,
        size=size.output,
        frame_rate=info.frame_rate,
        quality="lossless" if arguments.lossless else "lossy",
        crf=arguments.crf,
        bit_depth=arguments.bit_depth,
        sample_aspect_ratio=size.sample_aspect_ratio,
    )
    with progress(total, "upscaling", "frame", start=parts.frames) as bar:
        parts.write(clips, open_writer, statistics, bar.advance)


def _job(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that decides the pixels of the output, for people to read where it has changed."""
    job = {name: str(value) for name, value in vars(arguments).items() if name not in ("output", "stats")}
    return job | {
        "input": _state(arguments.input),
        "model": "bicubic" if arguments.bicubic else " ".join(map(_state, _files(arguments.model))),
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors"))


def _state(path: Path) -> str:
    state = path.stat()
    return f"{path.resolve()} of {state.st_size} bytes at {state.st_mtime_ns}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.upscale", description="Upscale a video with a one-step model, ×4 or to any size."
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="model folder (what training exports)")
    model.add_argument(
        "--bicubic", action="store_true", help="no model: the baseline, what the model is conditioned on"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--scale", type=float, help="of both sides; default: 4, which is what the model does")
    sizes.add_argument("--height", type=int, help="lines of the output; the width follows")
    sizes.add_argument("--size", type=parse_size, metavar="WIDTHxHEIGHT")
    parser.add_argument("--max-size", type=int, help="no side of the output is larger, px")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="one of the model's cached prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="Euler steps; default: what the model was made for")
    parser.add_argument("--guidance", type=float, help="w of v(c) + w(v(c) - v(0)); default: the model's")
    parser.add_argument("--window", type=int, default=21, help="frames the model sees at a time")
    parser.add_argument("--overlap", type=int, default=5, help="frames that consecutive windows share")
    parser.add_argument("--tile", type=int, help="DiT tile in output pixels; default: undivided")
    parser.add_argument("--vae-tile", type=int, help="VAE tile in output pixels; default: undivided")
    parser.add_argument("--decode-tile", type=int, help="VAE decoder tile; default: as --vae-tile")
    parser.add_argument("--tile-overlap", type=int, default=128, help="pixels; less than 128 may leave seams")
    parser.add_argument("--colour-fix", choices=("none", "wavelet", "adain"), default="none")
    parser.add_argument("--start", type=int, default=0, help="first frame")
    parser.add_argument("--frames", type=int, help="how many frames; default: all")
    parser.add_argument("--crf", type=int, default=15, help="x264 quality; 15 is visually lossless")
    parser.add_argument("--lossless", action="store_true", help="x264 RGB without loss, for scoring")
    parser.add_argument("--bit-depth", type=int, choices=(8, 10), default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--attention", choices=get_args(Attention), default="auto")
    parser.add_argument(
        "--part-frames", type=int, default=750, help="a killed job loses at most so many frames and a window"
    )
    parser.add_argument("--stats", type=Path, help="write what was done and how long it took as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
