"""Upscale a video ×4.

    python -m pipeline.upscale in.mp4 out.mp4 --model MODEL_DIR

The film streams through in windows that overlap and are blended, cut at scene changes, so memory stays bounded and no
scene bleeds into the next. Sound and frame rate are kept. The output appears under its name only when it is whole; a
killed job goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError, run_command
from common.progress import progress
from common.scale import SCALE
from common.video_io import OUTPUT_SUFFIXES, VideoInfo, VideoWriter, probe, read_frames
from pipeline.model.attention import set_attention
from pipeline.model.prompts import DEFAULT_PROMPT
from pipeline.model.vae import to_frames, upsample_low_resolution
from pipeline.resumable_video import FilmParts, Place
from pipeline.vsr_pipeline import Tiling, VSRPipeline, open_pipeline

#: mean absolute change of 16x16-pixel thumbnails (0…255) from one frame to the next that is taken for a cut [ours]
CUT_THRESHOLD = 40.0


def split_film(
    frames: Iterator[np.ndarray], window: int, overlap: int, first: int = 0
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cut a stream of frames, the film from frame `first` on, into clips for the model.

    Yields:
        (number of its first frame, how many of its first frames the clip before also holds, uint8 (F, h, w, 3)).
        Clips of one scene overlap by `overlap` frames; a new scene starts a new clip.
    """
    held: list[np.ndarray] = []
    start, shared = first, 0
    last_thumbnail: np.ndarray | None = None
    for number, frame in enumerate(frames, first):
        thumbnail = _thumbnail(frame)
        cut = last_thumbnail is not None and np.abs(thumbnail - last_thumbnail).mean() > CUT_THRESHOLD
        last_thumbnail = thumbnail
        if cut and len(held) > shared:
            yield start, shared, np.stack(held)
        if cut:
            held, start, shared = [], number, 0
        held.append(frame)
        if len(held) == window:
            yield start, shared, np.stack(held)
            held = held[window - overlap :]
            start, shared = number + 1 - overlap, overlap
    if len(held) > shared:
        yield start, shared, np.stack(held)


def upscale_film(
    pipeline: VSRPipeline,
    frames: Iterator[np.ndarray],
    *,
    window: int,
    overlap: int,
    first: int = 0,
    statistics: dict[str, float],
    **options: object,
) -> Iterator[tuple[np.ndarray, Place | None]]:
    """Upscaled clips in order, (F, 4h, 4w, 3), cross-faded where they overlapped: every frame of the film once.

    After some of them the film can go on from a place: the window whose end is still to be cross-faded comes out the
    same again when it is read from its first frame.

    Args:
        frames: the film from frame `first` on.
        overlap: at most half of `window`, so that no frame lies in three windows.
        options: the pipeline's.
    """
    tail: np.ndarray | None = None
    for start, shared, clip in split_film(frames, window, overlap, first):
        result = pipeline(clip, first_frame=start, **options)  # type: ignore[arg-type]
        statistics["dit_evaluations"] = statistics.get("dit_evaluations", 0) + result.dit_evaluations
        for part, seconds in result.seconds.items():
            statistics[f"{part}_s"] = statistics.get(f"{part}_s", 0.0) + seconds
        upscaled = result.frames
        if tail is not None:
            if shared:
                ramp = ((np.arange(shared, dtype=np.float32) + 0.5) / shared)[:, None, None, None]
                mixed = tail * (1 - ramp) + upscaled[:shared] * ramp
                tail, upscaled = np.rint(mixed).astype(upscaled.dtype), upscaled[shared:]
            yield tail, None
        keep = min(overlap, len(upscaled))
        if len(upscaled) > keep:
            yield upscaled[: len(upscaled) - keep], Place(start, len(clip) - keep)
        tail = upscaled[len(upscaled) - keep :]
    if tail is not None and len(tail):
        yield tail, None


def model_film(
    frames: Iterator[np.ndarray], first: int, arguments: argparse.Namespace, statistics: dict[str, float]
) -> Iterator[tuple[np.ndarray, Place | None]]:
    """`upscale_film` with the command's options; the model is opened before anything is returned."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    pipeline = open_pipeline(arguments.model, arguments.device, dtype)
    set_attention(pipeline.transformer, arguments.attention)
    return upscale_film(
        pipeline,
        frames,
        window=arguments.window,
        overlap=arguments.overlap,
        first=first,
        statistics=statistics,
        prompt=arguments.prompt,
        seed=arguments.seed,
        num_inference_steps=arguments.steps,
        guidance_weight=arguments.guidance,
        colour_fix=arguments.colour_fix,
        bit_depth=arguments.bit_depth,
        tiling=replace(arguments.tiling, window_frames=None),  # the film is split here, not there
    )


def bicubic_film(
    frames: Iterator[np.ndarray], first: int, arguments: argparse.Namespace, statistics: dict[str, float]
) -> Iterator[tuple[np.ndarray, Place | None]]:
    """Frames enlarged as for z_LR, one by one."""
    statistics["dit_evaluations"] = 0
    for number, frame in enumerate(frames, first):
        yield (
            to_frames(upsample_low_resolution(frame[None]), arguments.bit_depth).numpy(),
            Place(number + 1, 0),
        )


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    rows = np.linspace(0, frame.shape[0], 17, dtype=int)[:-1]
    columns = np.linspace(0, frame.shape[1], 17, dtype=int)[:-1]
    sums = np.add.reduceat(np.add.reduceat(frame.mean(2, dtype=np.float32), rows, 0), columns, 1)
    return sums / (frame.shape[0] * frame.shape[1] / 256)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the partial file is removed
    arguments = _arguments()
    info = probe(arguments.input)
    arguments.tiling = Tiling(
        arguments.window,
        arguments.overlap,
        transformer_tile_px=arguments.tile,
        vae_tile_px=arguments.vae_tile,
        decode_tile_px=arguments.decode_tile,
        overlap_px=arguments.tile_overlap,
    )
    if arguments.output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise UserError(f"cannot write {arguments.output}: choose one of {', '.join(OUTPUT_SUFFIXES)}")
    began = time.perf_counter()
    parts = FilmParts(arguments.output, _job(arguments), arguments.part_frames)
    if parts.refused:
        print(f"starting over: {parts.refused[0]}", file=sys.stderr)
    elif parts.whole:
        print(f"going on after {parts.frames} frames", file=sys.stderr)
    try:
        statistics = parts.statistics
        if parts.place is not None:
            _write_parts(parts, parts.place, info, arguments, statistics)
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
        "width": info.width * SCALE,
        "height": info.height * SCALE,
        "seconds": round(time.perf_counter() - began, 3),
        **{name: round(value, 3) for name, value in statistics.items()},
        "device": arguments.device,
    }
    if arguments.stats:
        arguments.stats.parent.mkdir(parents=True, exist_ok=True)
        temporary = arguments.stats.with_name(f".{arguments.stats.name}.{os.getpid()}")
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(temporary, arguments.stats)
    print(
        f"{arguments.output}: {parts.frames} frames of {record['width']}x{record['height']} in {record['seconds']} s"
    )


def _write_parts(
    parts: FilmParts,
    place: Place,
    info: VideoInfo,
    arguments: argparse.Namespace,
    statistics: dict[str, float],
) -> None:
    """Upscale what is missing, from `place` on."""
    total = info.estimated_frames and max(info.estimated_frames - arguments.start, 0)
    wanted = None if arguments.frames is None else arguments.frames - place.start
    if arguments.frames is not None:
        total = min(arguments.frames, total or arguments.frames)
    frames = read_frames(arguments.input, arguments.start + place.start, wanted)
    enlarge = bicubic_film if arguments.bicubic else model_film
    clips = enlarge(frames, place.start, arguments, statistics)  # opens the model, so before any file
    open_writer = partial(
        VideoWriter,
        width=info.width * SCALE,
        height=info.height * SCALE,
        frame_rate=info.frame_rate,
        quality="lossless" if arguments.lossless else "lossy",
        crf=arguments.crf,
        bit_depth=arguments.bit_depth,
        sample_aspect_ratio=info.sample_aspect_ratio,
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
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors")
    )


def _state(path: Path) -> str:
    state = path.stat()
    return f"{path.resolve()} of {state.st_size} bytes at {state.st_mtime_ns}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.upscale", description="Upscale a video four times with a one-step model."
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="model folder (what training exports)")
    model.add_argument(
        "--bicubic", action="store_true", help="no model: the baseline, what the model is conditioned on"
    )
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="one of the model's cached prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="Euler steps; default: what the model was made for")
    parser.add_argument("--guidance", type=float, help="w of v(c) + w(v(c) - v(0)); default: the model's")
    parser.add_argument("--window", type=int, default=21, help="frames the model sees at a time")
    parser.add_argument("--overlap", type=int, default=5, help="frames that consecutive windows share")
    parser.add_argument("--tile", type=int, help="DiT tile in output pixels; default: whole frames")
    parser.add_argument("--vae-tile", type=int, help="VAE tile in output pixels; default: whole frames")
    parser.add_argument("--decode-tile", type=int, help="VAE decoder tile; default: as --vae-tile")
    parser.add_argument("--tile-overlap", type=int, default=128, help="pixels; less than 128 may leave seams")
    parser.add_argument("--colour-fix", choices=("none", "wavelet", "adain"), default="none")
    parser.add_argument("--start", type=int, default=0, help="first frame")
    parser.add_argument("--frames", type=int, help="how many frames; default: all")
    parser.add_argument("--crf", type=int, default=15, help="x264 quality; 15 is visually lossless")
    parser.add_argument("--lossless", action="store_true", help="x264 RGB without loss, for scoring")
    parser.add_argument("--bit-depth", type=int, choices=(8, 10), default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="bf16" if torch.cuda.is_available() else "fp32"
    )
    parser.add_argument(
        "--attention", choices=("auto", "flash", "flash3", "xformers", "native"), default="auto"
    )
    parser.add_argument(
        "--part-frames", type=int, default=750, help="a killed job loses at most so many frames and a window"
    )
    parser.add_argument("--stats", type=Path, help="write what was done and how long it took as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
