"""Tiles and windows that fit into the free memory, chosen before the first frame; a resumed job keeps them."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from common.scale import SCALE
from pipeline.memory_estimate import GIB, MemoryEstimate
from pipeline.upscale_job import Job, frames_to_write
from pipeline.upscale_options import dtypes
from pipeline.video_windows import Windows
from pipeline.vsr_pipeline import Tiling, smaller_tiles

#: of what a device may need, to what is predicted. A CPU: holes of the heap in any step; a GPU: its allocator [ours]
OVERHEAD = {"cpu": 2.2, "cuda": 1.2}
#: bytes a pixel of a window that suffice in any case: four times what Wan2.1 needs in float32 [ours]
PLENTY = 4096
#: to try where the smallest tiles do not fit; each starts a multiple of four frames after the one before [ours]
SHORTER = (Windows(13, 5), Windows(9, 1), Windows(5, 1))


def fit(job: Job, arguments: argparse.Namespace) -> Job:
    """The job with smaller tiles, then shorter windows, where its own need more memory than is free.

    Sizes that were asked for stay: tiles of the VAE where one of them is given, windows likewise.
    """
    device, workers = Counter(arguments.devices or (arguments.device,)).most_common(1)[0]
    free = free_bytes(device)
    if arguments.bicubic or free is None or arguments.vae_tile or arguments.decode_tile:
        return job
    width, height = (side * SCALE for side in job.size.model_input)
    frames = frames_to_write(job, arguments)

    def seen(windows: Windows) -> int:
        return windows.frames if frames is None else min(frames, windows.frames)

    if PLENTY * width * height * seen(job.windows) * workers <= free:
        return job  # without the seconds that the estimate takes
    dtype, vae_dtype = dtypes(arguments)
    estimate = MemoryEstimate(
        arguments.model, dtype, arguments.codec, vae_dtype=vae_dtype, offload=arguments.offload, device=device
    )

    def needed(windows: Windows, tiling: Tiling) -> float:
        peak = estimate.window(seen(windows), width, height, tiling).peak
        return peak * OVERHEAD.get(torch.device(device).type, 1.0) * workers

    asked = arguments.window is not None or arguments.overlap is not None
    windows, tiling, need = choose(job.windows, job.tiling, width, height, needed, free, () if asked else SHORTER)
    shorter = f"--window {windows.frames} --overlap {windows.overlap} " if windows != job.windows else ""
    if (windows, tiling) != (job.windows, job.tiling):
        print(f"{free / GIB:.1f} GiB of memory are free: {shorter}{tiling.options()}", file=sys.stderr)
    if need > free:
        print(f"about {need / GIB:.1f} GiB are needed: memory may not suffice", file=sys.stderr)
    return replace(job, windows=windows, tiling=tiling)


def choose(
    windows: Windows,
    tiling: Tiling,
    width: int,
    height: int,
    needed: Callable[[Windows, Tiling], float],
    free: float,
    shorter: tuple[Windows, ...],
) -> tuple[Windows, Tiling, float]:
    """The first sizes that fit, and what they need; the smallest where none fits.

    Args:
        width, height: of the output, px.
        needed: bytes.
        shorter: windows to try with the smallest tiles, longest first.
    """

    def sizes() -> Iterator[tuple[Windows, Tiling]]:
        smaller: Tiling | None = tiling
        while smaller is not None:
            last = smaller
            yield windows, last
            smaller = smaller_tiles(last, width, height)
        for window in shorter:
            yield window, last

    for chosen in sizes():
        need = needed(*chosen)
        if need <= free:
            break
    return *chosen, need


def free_bytes(device: str) -> int | None:
    """That this process can take; None where nothing tells."""
    if torch.device(device).type == "cuda":
        if (torch.device(device).index or 0) >= torch.cuda.device_count():
            return None  # a dry run for another machine
        held = torch.cuda.memory_reserved(device)  # the model of a video before, which is counted as needed
        return torch.cuda.mem_get_info(device)[0] + held
    if torch.device(device).type != "cpu":
        return None
    free = None
    with suppress(OSError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # a container's limit; files that are cached can go
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        limit = int((group / "memory.max").read_text()) - used + int(cached)
        free = limit if free is None else min(free, limit)
    return free


def record(job: Job) -> dict[str, Any]:
    """Its sizes, as JSON."""
    return {"windows": asdict(job.windows), "tiling": asdict(job.tiling)}


def resumed(job: Job, values: dict[str, Any]) -> Job:
    """The job with the sizes that `record` gave of an earlier run."""
    return replace(job, windows=Windows(**values["windows"]), tiling=Tiling(**values["tiling"]))
