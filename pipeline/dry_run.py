"""What `--dry-run` prints: output, windows and tiles, memory by size, disk, time. Nothing is written."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from common.scale import SCALE
from pipeline.memory_estimate import GIB, MemoryEstimate, WindowMemory
from pipeline.resumable_video import parts_folder
from pipeline.tiling import spans
from pipeline.upscale_job import Job, frames_to_write
from pipeline.upscale_options import dtypes
from pipeline.upscale_source import PIPE
from pipeline.video_windows import Windows
from pipeline.vsr_pipeline import Tiling

#: output sizes of the table, px
SIZES = ((640, 360), (1280, 720), (1920, 1080), (3840, 2160))
#: decoder tiles of the table, px; None: whole frames
TILES = (None, 1024, 512)
#: bits of a pixel in a file of usual content [ours: rounded up; noise needs more, cartoons less]
BITS_PER_PIXEL = {
    "h264": 0.5, "hevc": 0.3, "av1": 0.25, "vp9": 0.4, "prores": 4.0, "png": 12.0, "tiff": 16.0, "jpeg": 4.0,
    "exr": 16.0,
}  # fmt: skip
LOSSLESS_BITS_PER_PIXEL = 8.0
#: of the parts, the joined video and the output, two at a time
COPIES = 2


def report(job: Job, arguments: argparse.Namespace) -> list[str]:
    """Lines to print."""
    frames = frames_to_write(job, arguments)
    width, height = job.size.output
    model_width, model_height = (side * SCALE for side in job.size.model_input)
    shrunk = job.size.model_input != (job.info.width, job.info.height)
    lines = [
        f"input   {job.info.width}x{job.info.height}, {'unknown' if frames is None else frames} frames at "
        f"{float(job.written_rate):.6g} frames/s",
        f"output  {width}x{height}, {job.codec}, {job.bit_depth} bits"
        + (f"; the model makes {model_width}x{model_height}" if (model_width, model_height) != (width, height) else "")
        + (", of a source shrunk first" if shrunk else ""),
    ]
    if not arguments.bicubic:
        tiles = tiles_of_a_window(job.tiling, model_width, model_height)
        number = "unknown" if frames is None else f"at least {windows_of(frames, job.windows)}"
        lines.append(
            f"windows {number} of {job.windows.frames} frames, cuts add to them; tiles of each: "
            + ", ".join(f"{name} {count}" for name, count in tiles.items())
        )
        seen = job.windows.frames if frames is None else min(frames, job.windows.frames)
        lines += _memory(job, arguments, seen, model_width, model_height)
    lines += _disk(job, arguments, frames)
    return [*lines, f"time    {_time(job, frames)}"]


def windows_of(frames: int, windows: Windows) -> int:
    """Of a video without cuts."""
    return 1 + max(0, -(-(frames - windows.frames) // (windows.frames - windows.overlap)))


def tiles_of_a_window(tiling: Tiling, width: int, height: int) -> dict[str, int]:
    """How many times each step runs for one window of the model's output size."""
    sides = {
        "encode": tiling.vae_tile_px,
        "transformer": tiling.transformer_tile_px,
        "decode": tiling.decode_tile_px or tiling.vae_tile_px,
    }
    return {
        name: len(list(spans(height, side, tiling.overlap_px))) * len(list(spans(width, side, tiling.overlap_px)))
        for name, side in sides.items()
    }


def _memory(job: Job, arguments: argparse.Namespace, frames: int, width: int, height: int) -> list[str]:
    dtype, vae_dtype = dtypes(arguments)
    device = (arguments.devices or (arguments.device,))[0]
    estimate = MemoryEstimate(
        arguments.model, dtype, arguments.codec, vae_dtype=vae_dtype, offload=arguments.offload, device=device
    )
    own = estimate.window(frames, width, height, job.tiling)
    steps = ", ".join(f"{name} {getattr(own, name) / GIB:.2f}" for name in ("encode", "transformer", "decode"))
    heads = (f"tiles of {tile}, {2 * tile}" if tile else "whole frames" for tile in TILES)
    lines = [
        f"memory  {own.peak / GIB:.2f} GiB in {arguments.dtype}: weights {own.weights / GIB:.2f} and the largest of",
        f"        {steps}; the program comes on top",
        f"        by size, {frames} frames, GiB (tiles: --decode-tile, --vae-tile):",
        " " * 18 + "".join(f"{head:>22}" for head in heads),
    ]
    for size in SIZES:
        cells = (_with_tile(estimate, frames, size, tile) for tile in TILES)
        lines.append(f"        {f'{size[0]}x{size[1]}':<10}" + "".join(f"{cell.peak / GIB:22.2f}" for cell in cells))
    return lines


def _with_tile(estimate: MemoryEstimate, frames: int, size: Sequence[int], tile: int | None) -> WindowMemory:
    return estimate.window(frames, size[0], size[1], Tiling(decode_tile_px=tile, vae_tile_px=tile and 2 * tile))


def _disk(job: Job, arguments: argparse.Namespace, frames: int | None) -> list[str]:
    if job.output == PIPE:
        return ["disk    nothing: standard output"]
    need = disk_need(job, arguments, frames)
    free = free_disk(job.output)
    if need is None:
        return [f"disk    unknown: the input does not say how many frames it has; {free / GIB:.2f} GiB are free"]
    return [
        f"disk    about {COPIES * need / GIB:.3g} GiB for a while and {need / GIB:.3g} GiB at the end "
        f"(content decides); {free / GIB:.2f} GiB are free"
    ]


def disk_need(job: Job, arguments: argparse.Namespace, frames: int | None) -> float | None:
    """Bytes of the output, at the usual number of bits a pixel; None where frames are not counted."""
    width, height = job.size.output
    bits = (
        LOSSLESS_BITS_PER_PIXEL
        if arguments.lossless
        else BITS_PER_PIXEL[job.codec.removesuffix("_nvenc")] * (2 if job.bit_depth == 16 else 1)
    )
    return None if frames is None else frames * width * height * bits / 8


def free_disk(output: Path) -> int:
    """Bytes where it is to be written."""
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def disk_warning(job: Job, arguments: argparse.Namespace) -> str | None:
    """Said before the first frame, where the output will hardly fit."""
    need, free = disk_need(job, arguments, frames_to_write(job, arguments)), free_disk(job.output)
    if need is None or COPIES * need <= free:
        return None
    return (
        f"about {COPIES * need / GIB:.3g} GiB of disk are needed for a while, content decides; "
        f"{free / GIB:.3g} GiB are free: full, it stops, and the same command goes on when there is room"
    )


def _time(job: Job, frames: int | None) -> str:
    """From the parts that an interrupted run left."""
    folder = parts_folder(job.output)
    done, seconds = 0, 0.0
    for path in sorted(folder.glob("part-*.json")):
        part = json.loads(path.read_text())
        done += part["frames"]
        seconds = sum(value for name, value in part["statistics"].items() if name.endswith("_s"))
    if not done or not seconds:
        return "unknown before the first part; --frames 42 upscales a little and says how long it took"
    left = "" if frames is None else f", {(frames - done) * seconds / done:.0f} s of the model for the rest"
    return f"{done} frames are done at {seconds / done:.3g} s a frame{left}"
