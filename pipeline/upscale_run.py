"""The frames of one job on their way: read, upscaled and written, in parts or to standard output."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from common.bit_depth import BitDepth
from common.errors import UserError
from common.prefetch import prefetch
from common.progress import progress
from common.scale import SCALE
from common.video_reader import Mark
from common.video_writer import VideoWriter
from pipeline.model.attention import set_attention
from pipeline.model.compile_blocks import compile_blocks
from pipeline.model.config import Attention
from pipeline.model.vae import to_frames, upsample_low_resolution
from pipeline.resumable_video import VideoParts
from pipeline.transparency import Transparency
from pipeline.upscale_job import Job, frames_to_write
from pipeline.upscale_options import dtypes
from pipeline.upscale_source import FrameReader
from pipeline.video_windows import Place, upscale_video
from pipeline.vsr_pipeline import Tiling, VSRPipeline, open_pipeline, smaller_tiles

#: a video that ends so many frames before its header says is no rounding
MISSING_FRAMES = 3


Clips = Iterator[tuple[np.ndarray, Place | None]]
#: called with frames written and frames in all, None where that is not known; what it raises ends the job
Watch = Callable[[int, int | None], None]


@cache
def _pipeline(
    model: Path,
    device: str,
    copy: int,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    attention: Attention,
    compiled: bool,
    offload: bool,
) -> VSRPipeline:
    """Opened once for all videos of a folder; `copy` tells those on one device apart."""
    pipeline = open_pipeline(model, device, {"vae": vae_dtype, "default": dtype}, offload=offload)
    set_attention(pipeline.transformer, attention)
    if compiled:
        compile_blocks(pipeline.transformer, device)
    return pipeline


def with_model(
    frames: Iterator[np.ndarray],
    place: Place,
    job: Job,
    tiling: Tiling,
    arguments: argparse.Namespace,
    statistics: dict[str, float],
) -> Clips:
    """`upscale_video` with the command's options; the model is opened before anything is returned."""
    dtype, vae_dtype = dtypes(arguments)
    settings = (dtype, vae_dtype, arguments.attention, arguments.compile, arguments.offload)
    devices = arguments.devices or (arguments.device,)
    pipelines = [_pipeline(arguments.model, device, copy, *settings) for copy, device in enumerate(devices)]
    pipelines[0].codec(arguments.codec)  # an error now, before the first frame
    return upscale_video(
        pipelines,
        frames,
        job.windows,
        first=place.start,
        context=place.context,
        statistics=statistics,
        prompt=arguments.prompt,
        seed=arguments.seed,
        num_inference_steps=arguments.steps,
        guidance_weight=arguments.guidance,
        colour_fix=arguments.colour_fix,
        bit_depth=job.frame_bits,
        tiling=tiling,
        codec=arguments.codec,
        fixed_noise=arguments.fixed_noise,
    )


def with_bicubic(frames: Iterator[np.ndarray], place: Place, bit_depth: BitDepth) -> Clips:
    """Frames enlarged as for z_LR, one by one."""
    for number, frame in enumerate(itertools.islice(frames, place.context, None), place.start):
        yield (to_frames(upsample_low_resolution(frame[None]), bit_depth).numpy(), Place(number + 1, 0))


def upscale_parts(
    parts: VideoParts,
    job: Job,
    arguments: argparse.Namespace,
    statistics: dict[str, float],
    on_tiling: Callable[[Tiling], None],
    watch: Watch | None = None,
) -> None:
    """All that is missing; where the GPU's memory is full, on from the last complete part with smaller tiles.

    Args:
        on_tiling: is told which.

    Raises:
        UserError: the smallest tiles do not fit either.
    """
    tiling: Tiling | None = job.tiling
    while parts.place is not None:
        assert tiling is not None
        try:
            return write_parts(parts, parts.place, job, arguments, tiling, statistics, watch)
        except torch.cuda.OutOfMemoryError:
            width, height = (side * SCALE for side in job.size.model_input)
            tiling = smaller_tiles(tiling, width, height)
            if tiling is None:
                raise UserError("the GPU's memory is full with the smallest tiles; try a smaller --window") from None
            statistics.clear()
            statistics.update(parts.statistics)
            print(f"the GPU's memory is full: on with {tiling.options()}", file=sys.stderr)
            on_tiling(tiling)
        torch.cuda.empty_cache()


def write_parts(
    parts: VideoParts,
    place: Place,
    job: Job,
    arguments: argparse.Namespace,
    tiling: Tiling,
    statistics: dict[str, float],
    watch: Watch | None = None,
) -> None:
    """Upscale what is missing, from `place` on.

    Raises:
        UserError: the input is damaged and `--on-error stop` was given, or a part cannot be written.
    """
    reader = open_reader(job, arguments, place, parts.mark)
    clips = upscaled(reader, place, job, arguments, tiling, statistics)
    total = frames_to_write(job, arguments)
    with progress(total, "upscaling", "frame", start=parts.frames) as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            if watch is not None:
                watch(bar.done, total)

        parts.write(clips, reader, writer_of(job, arguments), statistics, advance)


def write_to_pipe(job: Job, arguments: argparse.Namespace, statistics: dict[str, float], pipe: int) -> FrameReader:
    """The whole video as y4m, without parts: what is in the pipe cannot be resumed.

    Args:
        pipe: a file descriptor.

    Raises:
        UserError: the input is damaged and `--on-error stop` was given, or the other side reads no more.
    """
    reader = open_reader(job, arguments, Place())
    with (
        progress(frames_to_write(job, arguments), "upscaling", "frame") as bar,
        writer_of(job, arguments)(job.output, pipe=pipe) as writer,
    ):
        for frames, _ in upscaled(reader, Place(), job, arguments, job.tiling, statistics):
            writer.write(frames)
            bar.advance(len(frames))
    return reader


def open_reader(job: Job, arguments: argparse.Namespace, place: Place, mark: Mark | None = None) -> FrameReader:
    """What is left to read where the output goes on at `place`, after the frames of its context.

    Args:
        mark: of the first of them; they are sought there instead of decoding all before.
    """
    wanted = None if arguments.frames is None else arguments.frames - place.start + place.context
    return job.source.reader(
        arguments.start + place.start - place.context,
        wanted,
        size=job.size.model_input,
        frame_rate=job.frame_rate,
        deinterlace=job.deinterlace,
        bits=16 if job.frame_bits > 8 and job.info.bits > 8 else 8,
        mark=mark,
        alpha=job.alpha,
        tone_map=arguments.tone_map,
    )


def upscaled(
    reader: FrameReader,
    place: Place,
    job: Job,
    arguments: argparse.Namespace,
    tiling: Tiling,
    statistics: dict[str, float],
) -> Clips:
    """Clips of the output from the window at `place` on; frames are read ahead in a thread."""
    frames = prefetch(_until_damaged(reader) if arguments.on_error == "stop" else iter(reader), job.windows.frames)
    transparency = Transparency(place.context, job.frame_bits) if job.alpha else None
    if transparency:
        frames = transparency.taken_from(frames)
    if arguments.bicubic:
        statistics["dit_evaluations"] = 0
        clips = with_bicubic(frames, place, job.frame_bits)
    else:
        clips = with_model(frames, place, job, tiling, arguments, statistics)
    return transparency.given_to(clips) if transparency else clips


def writer_of(job: Job, arguments: argparse.Namespace) -> Callable[..., VideoWriter]:
    """Opens a file, or a pipe, for the frames of the job."""
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
        frame_bits=job.frame_bits,
        sample_aspect_ratio=job.size.sample_aspect_ratio,
        colour=job.info.colour,
        alpha=job.alpha,
        b_frames=job.output.suffix.lower() != ".avi",
    )


def _until_damaged(reader: FrameReader) -> Iterator[np.ndarray]:
    for frame in reader:
        if reader.errors:
            break
        yield frame
    if reader.errors:
        raise UserError(
            f"{reader.path} is damaged after {reader.count} frames ({reader.errors[0]}); --on-error keep goes on"
        )


def damage_of(
    errors: list[str], frames: int, end_s: Fraction | None, job: Job, arguments: argparse.Namespace
) -> list[str]:
    """What is wrong with the input's frames, one line each.

    Args:
        errors: of the reader.
        frames: that were written.
        end_s: when the last frame ends, at a constant rate counted from the first that is written; None where frames
            have no times.
    """
    damage = []
    if errors:
        total = frames_to_write(job, arguments) if job.info.frames and job.frame_rate is None else None
        lost = f"{total - frames} of {total} frames are lost, " if total and total > frames else ""
        damage.append(f"damaged, {lost}{len(errors)} kinds of errors; the first: {errors[0]}")
    if arguments.frames is None and job.info.end_s is not None and end_s is not None:
        before_s = 0 if job.frame_rate is None else arguments.start / job.frame_rate
        missing = round((job.info.end_s - float(end_s + before_s)) * float(job.written_rate))
        if missing >= MISSING_FRAMES:
            damage.append(f"it ends {missing} frames earlier than its header says")
    return damage
