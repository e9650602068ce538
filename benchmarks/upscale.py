"""Where the time of upscaling goes, and how much memory it takes beside what `--dry-run` predicts.

    python benchmarks/upscale.py                       # any machine: the small model
    python benchmarks/upscale.py --model MODEL_DIR --device cuda --dtype bf16 --sizes 480x270 --frames 21

The same video goes through step by step (read all, upscale all, write all), and as the command does it, where FFmpeg
decodes and encodes beside the model; `read` and `write` are the seconds in which a thread waits for it. Both are run
several times in turn, so that a machine that gets slower or busier in the meantime is slower for both; medians are
shown. `CPU` is what this process and FFmpeg computed: it tells work from waiting for a core. Memory
is measured in a process of its own for each size: the growth of its resident memory while one window is upscaled on a
CPU, the allocator's peak on a GPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import run_command
from common.prefetch import prefetch
from common.scale import SCALE
from common.video_reader import VideoReader
from common.video_writer import VideoWriter
from pipeline.latent_codec import CodecName
from pipeline.memory_estimate import GIB, MemoryEstimate
from pipeline.output_size import parse_size
from pipeline.upscale_options import DEFAULT_MODEL
from pipeline.video_windows import Windows, upscale_video
from pipeline.vsr_pipeline import STEPS, Tiling, VSRPipeline, VSRResult, open_pipeline

SEED = 0
RATE = Fraction(25)
WORDS = {"transformer": "DiT", "beside": "of a CPU, by FFmpeg while the model runs"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def moving(width: int, height: int, frames: int) -> np.ndarray:
    """uint8 (F, H, W, 3): smooth noise that moves by a pixel a frame, so that there is no cut."""
    small = np.random.default_rng(SEED).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    frame = np.kron(small, np.ones((8, 8, 1), np.uint8))[:height, :width]
    return np.stack([np.roll(frame, number, axis=1) for number in range(frames)])


@dataclass
class Watched:
    """A pipeline; counts what FFmpeg computes while it runs."""

    pipeline: VSRPipeline
    programs_s: float = 0.0

    def __call__(self, *values: Any, **options: Any) -> VSRResult:
        before = programs_s()
        result = self.pipeline(*values, **options)
        self.programs_s += programs_s() - before
        return result


def programs_s() -> float:
    """Seconds of a CPU that programs started by this process have taken, those that ended and those that run."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime
    for children in Path("/proc/self/task").glob("*/children"):
        for program in children.read_text().split():
            with suppress(OSError):
                times = Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()
                seconds += (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


class Clocked:
    """Iterates over the same items; `seconds` are those of making them."""

    def __init__(self, items: Iterator[np.ndarray]) -> None:
        self._items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        began = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - began


def upscale(source: Path, output: Path, pipeline: VSRPipeline, *, overlapping: bool) -> dict[str, float]:
    """Seconds of each step, of all, and those that FFmpeg computes while the model runs.

    Args:
        overlapping: as the command does it; else all is read, then upscaled, then written.
    """
    began, cpu_before = time.perf_counter(), time.process_time() + programs_s()
    spent: dict[str, float] = {}
    model, reading = Watched(pipeline), Clocked(iter(VideoReader(source)))
    frames = prefetch(reading, Windows().frames) if overlapping else iter(list(reading))
    made = upscale_video([model], frames, Windows(), statistics=spent, colour_fix="wavelet")  # type: ignore[list-item]
    clips = (clip for clip, _ in made) if overlapping else iter([clip for clip, _ in made])
    first = next(clips)
    with VideoWriter(output, width=first.shape[2], height=first.shape[1], frame_rate=RATE) as writer:
        for clip in itertools.chain([first], clips):
            writer.write(clip)
    steps = {"read": reading.seconds, **{step: spent[f"{step}_s"] for step in STEPS}, "write": writer.seconds}
    cpu_s = time.process_time() + programs_s() - cpu_before
    return steps | {"wall": time.perf_counter() - began, "CPU": cpu_s, "beside": model.programs_s}


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each step."""
    return {step: statistics.median(run[step] for run in runs) for step in runs[0]}


def measured_memory(width: int, height: int, arguments: argparse.Namespace) -> int:
    """Bytes by which one window raises the peak of a process of its own, without the weights."""
    command = [sys.executable, __file__, "--window-of", f"{width}x{height}", "--model", str(arguments.model)]
    command += ["--device", arguments.device, "--dtype", arguments.dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def one_window(width: int, height: int, arguments: argparse.Namespace) -> int:
    """In the process that is measured."""
    pipeline = open_pipeline(arguments.model, arguments.device, DTYPES[arguments.dtype])
    frames = moving(width, height, Windows().frames)
    pipeline(moving(16, 16, 5))  # libraries that load on first use
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pipeline(frames)
        return torch.cuda.max_memory_allocated() - before
    before = _status_bytes("VmRSS")
    pipeline(frames)
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    """Linux's account of this process; ru_maxrss would begin with the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--size", type=parse_size, default=(64, 48), help="of the video whose time is measured, px")
    # nine windows: x264 looks 40 frames ahead, and of few frames it writes all at the end
    parser.add_argument("--frames", type=int, default=149)
    parser.add_argument("--repeats", type=int, default=3, help="of the run whose time is measured")
    sizes = [(32, 32), (64, 48), (96, 64), (128, 96)]
    parser.add_argument("--sizes", type=parse_size, nargs="*", default=sizes, help="inputs whose memory is measured")
    parser.add_argument("--window-of", type=parse_size, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.window_of:
        print(one_window(*arguments.window_of, arguments))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.mp4"
        width, height = arguments.size
        with VideoWriter(source, width=width, height=height, frame_rate=RATE, crf=10) as writer:
            writer.write(moving(width, height, arguments.frames))
        pipeline = open_pipeline(arguments.model, arguments.device, DTYPES[arguments.dtype])
        pipeline(moving(16, 16, 5))  # libraries that load on first use
        runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for number in range(2 * arguments.repeats):
            overlapping = number % 4 in (1, 2)  # A B B A …
            output = Path(folder) / f"{number}.mp4"
            runs[overlapping].append(upscale(source, output, pipeline, overlapping=overlapping))
        apart, together = medians(runs[False]), medians(runs[True])
    threads = torch.get_num_threads()
    print(f"# {os.cpu_count()} CPU cores, {threads} threads, torch {torch.__version__}, {arguments.device}")
    print(f"{arguments.frames} frames of {width}x{height}, seconds: one step after the other, and overlapping")
    for step, seconds in apart.items():
        print(f"  {WORDS.get(step, step):<40}{seconds:8.2f}{together[step]:8.2f}")
    walls = [" ".join(f"{run['wall']:.1f}" for run in runs[overlapping]) for overlapping in (False, True)]
    print(f"  wall of each run: {walls[0]}; overlapping: {walls[1]}")
    codec: CodecName = "fast" if pipeline.fast_decoder else "full"
    estimate, memory = MemoryEstimate(arguments.model, DTYPES[arguments.dtype], codec, device=arguments.device), []
    print("one window: input, predicted and measured GiB, without weights")
    for width, height in arguments.sizes:
        own = estimate.window(Windows().frames, width * SCALE, height * SCALE, Tiling())
        predicted, measured = own.peak - own.weights, measured_memory(width, height, arguments)
        memory.append({"width": width, "height": height, "predicted": predicted, "measured": measured})
        print(f"  {f'{width}x{height}':<12}{predicted / GIB:8.3f}{measured / GIB:8.3f}{measured / predicted:8.2f}")
    print(json.dumps({"apart_s": apart, "together_s": together, "memory_bytes": memory, "seed": SEED}))


if __name__ == "__main__":
    run_command(main)
