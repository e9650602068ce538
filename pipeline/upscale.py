"""Upscale videos, ×4 or to any size.

    python -m pipeline.upscale in.mp4 out.mp4 --model MODEL_DIR [--scale 2 | --height 2160 | --size 3840x2160]
    python -m pipeline.upscale FOLDER OUTPUT_FOLDER --model MODEL_DIR

The video streams through in windows that overlap and are cross-faded, cut at scene changes (pipeline/video_windows.py).
Every frame keeps its time; sound, subtitles, chapters and titles are kept (pipeline/container.py). The output is
written atomically. Run the command again to resume a killed job.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common.atomic import write_atomic
from common.command_line import exit_on_sigterm
from common.errors import UserError, run_command
from common.prefetch import prefetch
from common.progress import progress
from common.scale import SCALE
from common.scene_cuts import CONTEXT
from common.video_probe import VIDEO_SUFFIXES, named_like_a_video
from common.video_reader import VideoReader
from common.video_writer import OUTPUT_SUFFIXES, VideoWriter
from pipeline.model.attention import set_attention
from pipeline.model.config import Attention
from pipeline.model.vae import to_frames, upsample_low_resolution
from pipeline.resumable_video import VideoParts, delete_parts, only_job, was_finished
from pipeline.upscale_job import Job, job_identity, plan
from pipeline.upscale_options import parse_arguments
from pipeline.video_windows import Place, upscale_video
from pipeline.vsr_pipeline import Tiling, VSRPipeline, open_pipeline, smaller_tiles

#: exit status of a command whose input was damaged, or of a folder with a video that could not be upscaled
EXIT_DAMAGED = 3
#: a video that ends so many frames before its header says is no rounding
MISSING_FRAMES = 3

Clips = Iterator[tuple[np.ndarray, Place | None]]


@cache
def _pipeline(model: Path, device: str, dtype: torch.dtype, attention: Attention) -> VSRPipeline:
    pipeline = open_pipeline(model, device, dtype)
    set_attention(pipeline.transformer, attention)
    return pipeline


def with_model(
    frames: Iterator[np.ndarray],
    first: int,
    job: Job,
    tiling: Tiling,
    arguments: argparse.Namespace,
    statistics: dict[str, float],
) -> Clips:
    """`upscale_video` with the command's options; the model is opened before anything is returned."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    return upscale_video(
        _pipeline(arguments.model, arguments.device, dtype, arguments.attention),
        frames,
        job.windows,
        first=first,
        context=min(first, CONTEXT),
        statistics=statistics,
        prompt=arguments.prompt,
        seed=arguments.seed,
        num_inference_steps=arguments.steps,
        guidance_weight=arguments.guidance,
        colour_fix=arguments.colour_fix,
        bit_depth=job.bit_depth,
        tiling=tiling,
    )


def with_bicubic(frames: Iterator[np.ndarray], first: int, bit_depth: Literal[8, 10]) -> Clips:
    """Frames enlarged as for z_LR, one by one."""
    for number, frame in enumerate(itertools.islice(frames, min(first, CONTEXT), None), first):
        yield (to_frames(upsample_low_resolution(frame[None]), bit_depth).numpy(), Place(number + 1, 0))


def main() -> None:
    exit_on_sigterm()  # the partial file is removed
    arguments = parse_arguments()
    if arguments.input.is_dir():
        bad = upscale_folder(arguments)
    else:
        bad = upscale_file(arguments.input, arguments.output, arguments)
    if bad:
        raise SystemExit(EXIT_DAMAGED)


def upscale_folder(arguments: argparse.Namespace) -> bool:
    """Every video of the input folder under its name in the output folder; what is there already is left alone.

    Returns:
        Whether some failed, or are damaged and `--on-error` is warn; they are listed at the end.

    Raises:
        UserError: no video in the folder, or the output is a file.
    """
    if arguments.stats:
        raise UserError("--stats belongs to one video; leave it out for a folder")
    sources = sorted(path for path in arguments.input.iterdir() if named_like_a_video(path.name))
    if not sources:
        raise UserError(f"no video in {arguments.input} ({', '.join(VIDEO_SUFFIXES)})")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"{arguments.output} is a file; a folder's videos need a folder")
    failed = []
    names = [f"{source.stem}{_folder_suffix(source)}" for source in sources]
    for number, (source, name) in enumerate(zip(sources, names, strict=True), 1):
        if names.count(name) > 1 and source.name != name:
            name = f"{source.name}{_folder_suffix(source)}"
        output = arguments.output / name
        if output.exists() and not arguments.overwrite:
            print(f"{number} of {len(sources)}: {output} is there already", file=sys.stderr)
            continue
        print(f"{number} of {len(sources)}: {source.name}", file=sys.stderr)
        try:
            if upscale_file(source, output, arguments):
                failed.append(f"damaged: {source}")
        except (UserError, OSError) as error:
            failed.append(f"failed: {error}")
    for line in failed:
        print(line, file=sys.stderr)
    return bool(failed)


def _folder_suffix(source: Path) -> str:
    return source.suffix if source.suffix.lower() in OUTPUT_SUFFIXES else ".mkv"


def upscale_file(source: Path, output: Path, arguments: argparse.Namespace) -> bool:
    """One video; returns whether it is damaged and `--on-error` is warn."""
    if _was_complete(source, output, arguments):
        print(f"{output} was complete already", file=sys.stderr)
        return False
    job = plan(source, output, arguments)
    began = time.perf_counter()
    with only_job(output):
        identity = job_identity(arguments, source) | {"codec": job.codec, "bit_depth": job.bit_depth}
        parts = VideoParts(output, identity, arguments.part_frames, restart=arguments.restart)
        if parts.complete:
            print(f"resuming after {parts.frames} frames", file=sys.stderr)
        done, statistics = False, parts.statistics
        try:
            tracks_from = None if arguments.start or arguments.frames else source
            if not parts.complete:
                black = np.zeros((1, *(side * SCALE for side in reversed(job.size.model_input)), 3), np.uint8)
                parts.rehearse(tracks_from, job.tracks, _writer(job, arguments), black)
            _upscale_parts(parts, job, arguments, statistics)
            times, last_s = parts.finish(tracks_from, job.tracks, job.info, job.frame_rate)
            done = True
        except KeyboardInterrupt:
            if parts.complete:
                print(f"interrupted after {parts.frames} frames; the same command resumes", file=sys.stderr)
            raise
        finally:
            parts.leave(done=done)
    damage = _damage(parts, times[-1] + last_s, job, arguments)
    for line in damage:
        print(f"warning: {source}: {line}", file=sys.stderr)
    seconds = round(time.perf_counter() - began, 3)
    if arguments.stats:
        record = {
            "input": str(source),
            "model": "bicubic" if arguments.bicubic else str(arguments.model),
            "seed": arguments.seed,
            "frames": parts.frames,
            "width": job.size.output[0],
            "height": job.size.output[1],
            "seconds": seconds,
            **{name: round(value, 3) for name, value in statistics.items()},
            "device": arguments.device,
            "damage": damage,
        }
        write_atomic(arguments.stats, json.dumps(record, indent=2) + "\n")
    print(f"{output}: {parts.frames} frames of {job.size.output[0]}x{job.size.output[1]} in {seconds} s")
    return bool(damage) and arguments.on_error == "warn"


def _was_complete(source: Path, output: Path, arguments: argparse.Namespace) -> bool:
    """Whether this job was killed between its last act and its clean-up, which is done now."""
    if arguments.overwrite or arguments.restart or not source.is_file():
        return False
    if not was_finished(output, job_identity(arguments, source)):
        return False
    with only_job(output):
        delete_parts(output)
    return True


def _upscale_parts(parts: VideoParts, job: Job, arguments: argparse.Namespace, statistics: dict[str, float]) -> None:
    """All that is missing; where the GPU's memory is full, on from the last complete part with smaller tiles.

    Raises:
        UserError: the smallest tiles do not fit either.
    """
    tiling: Tiling | None = job.tiling
    while parts.place is not None:
        assert tiling is not None
        try:
            return write_parts(parts, parts.place, job, arguments, tiling, statistics)
        except torch.cuda.OutOfMemoryError:
            width, height = (side * SCALE for side in job.size.model_input)
            tiling = smaller_tiles(tiling, width, height)
            if tiling is None:
                raise UserError("the GPU's memory is full with the smallest tiles; try a smaller --window") from None
            statistics.clear()
            statistics.update(parts.statistics)
            print(
                f"the GPU's memory is full: on with --decode-tile {tiling.decode_tile_px or tiling.vae_tile_px}"
                f" --vae-tile {tiling.vae_tile_px or 'whole'} --tile {tiling.transformer_tile_px or 'whole'}",
                file=sys.stderr,
            )
        torch.cuda.empty_cache()


def write_parts(
    parts: VideoParts,
    place: Place,
    job: Job,
    arguments: argparse.Namespace,
    tiling: Tiling,
    statistics: dict[str, float],
) -> None:
    """Upscale what is missing, from `place` on.

    Raises:
        UserError: the input is damaged and `--on-error stop` was given, or a part cannot be written.
    """
    total = job.info.estimated_frames and max(job.info.estimated_frames - arguments.start, 0)
    wanted = None if arguments.frames is None else arguments.frames - place.start
    if arguments.frames is not None:
        total = min(arguments.frames, total or arguments.frames)
    context = min(place.start, CONTEXT)  # frames before it, in which scene cuts are looked for
    reader = VideoReader(
        job.source,
        arguments.start + place.start - context,
        wanted and wanted + context,
        size=job.size.model_input,
        frame_rate=job.frame_rate,
        deinterlace=arguments.deinterlace,
        bits=16 if job.bit_depth == 10 and job.info.bits > 8 else 8,
    )
    frames = prefetch(_until_damaged(reader) if arguments.on_error == "stop" else iter(reader), arguments.window)
    if arguments.bicubic:
        statistics["dit_evaluations"] = 0
        clips = with_bicubic(frames, place.start, job.bit_depth)
    else:
        clips = with_model(frames, place.start, job, tiling, arguments, statistics)
    with progress(total, "upscaling", "frame", start=parts.frames) as bar:
        parts.write(clips, reader, context, _writer(job, arguments), statistics, bar.advance)


def _writer(job: Job, arguments: argparse.Namespace) -> Callable[[Path], VideoWriter]:
    return partial(
        VideoWriter,
        width=job.size.model_input[0] * SCALE,
        height=job.size.model_input[1] * SCALE,
        size=job.size.output,
        frame_rate=job.written_rate,
        quality="lossless" if arguments.lossless else "lossy",
        crf=arguments.crf,
        codec=job.codec,
        encoder_options=arguments.encoder_options,
        bit_depth=job.bit_depth,
        sample_aspect_ratio=job.size.sample_aspect_ratio,
        colour=job.info.colour,
        b_frames=job.output.suffix.lower() != ".avi",
    )


def _until_damaged(reader: VideoReader) -> Iterator[np.ndarray]:
    for frame in reader:
        if reader.errors:
            break
        yield frame
    if reader.errors:
        raise UserError(
            f"{reader.path} is damaged after {reader.count} frames ({reader.errors[0]}); --on-error keep goes on"
        )


def _damage(parts: VideoParts, end: Fraction, job: Job, arguments: argparse.Namespace) -> list[str]:
    """What is wrong with the input's picture, one line each; `end` is when its last frame ends, in seconds."""
    damage = []
    if parts.errors:
        damage.append(f"damaged, {len(parts.errors)} kinds of errors; the first: {parts.errors[0]}")
    if arguments.frames is None and job.info.end_s is not None:
        period_s = 1 / job.written_rate
        missing = round((job.info.end_s - float(end)) / float(period_s))
        if missing >= MISSING_FRAMES:
            damage.append(f"it ends {missing} frames earlier than its header says")
    return damage


if __name__ == "__main__":
    run_command(main)
