"""The paper's timing protocol: one clip of 21 frames of 1080p, after a warm-up; parameters and peak memory beside.

    python benchmarks/inference.py --model MODEL --device cuda --dtype bf16        # 480x270 to 1920x1080, as the paper
    python benchmarks/inference.py --model assets/small --size 64x48 --frames 9    # any machine
    python benchmarks/inference.py --name realesrgan --command 'upscaler -i {input} -o {output} -s 4'

A model is timed in this process by its own steps: encoding, transformer and decoding apart, from frames in memory to
frames in memory; loading, reading and writing are left out. A command is timed as a whole, its start and its files
included: `{input}` is a folder of PNG frames, `{output}` an empty folder in which it has to leave as many. Both run
once to warm up, then `--repeats` times; the median is printed. Memory is the allocator's peak for a model on a GPU,
else the resident memory of the process and its children. `--output` writes NAME.method.yaml, which `metrics.compare`
reads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, from anywhere

from benchmarks.upscale import DTYPES, SEED, moving
from common.atomic import write_atomic
from common.errors import UserError, run_command
from common.image_files import IMAGE_SUFFIXES
from common.scale import SCALE
from pipeline.output_size import parse_size
from pipeline.vsr_pipeline import Tiling, open_pipeline

#: of what the paper times
STEPS = ("encode", "transformer", "decode")
#: s between two looks at a command's memory
INTERVAL_S = 0.02


def time_model(frames: np.ndarray, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step for each repeat, parameters by component, peak memory in bytes."""
    pipeline = open_pipeline(arguments.model, arguments.device, DTYPES[arguments.dtype])
    tiling = Tiling(arguments.transformer_tile, arguments.vae_tile)
    on_gpu = torch.device(arguments.device).type == "cuda"
    pipeline(frames, tiling=tiling)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with PeakMemory() as memory:
        runs = [pipeline(frames, tiling=tiling) for _ in range(arguments.repeats)]
    parts = {name: getattr(pipeline, name) for name in ("transformer", "vae")}
    return {
        "seconds": {step: [run.seconds[step] for run in runs] for step in STEPS},
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else memory.peak,
        "dit_evaluations": runs[0].dit_evaluations,
    }


def time_command(frames: np.ndarray, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each repeat, peak resident memory of the command and its children.

    Raises:
        UserError: it fails, or leaves another number of frames.
    """
    if "{input}" not in arguments.command or "{output}" not in arguments.command:
        raise UserError("--command needs {input} and {output}, the folders of frames")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "input"
        source.mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(source / f"{number:06d}.png")
        seconds, peak = [], 0
        for run in range(arguments.repeats + 1):
            target = Path(folder) / f"output-{run}"
            target.mkdir()
            words = [word.format(input=source, output=target) for word in shlex.split(arguments.command)]
            began = time.perf_counter()
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
            with PeakMemory(process.pid) as memory:
                status = process.wait()
            seconds.append(time.perf_counter() - began)
            made = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in target.iterdir())
            if status or made != len(frames):
                raise UserError(f"--command ended with status {status} and {made} of {len(frames)} frames")
            peak = max(peak, memory.peak)
    return {"seconds": {"command": seconds[1:]}, "parameters": {}, "peak_bytes": peak}


class PeakMemory:
    """Largest resident memory of a process and its children within a block, by looking often; `peak` in bytes."""

    def __init__(self, pid: int | None = None) -> None:
        self._process, self._done, self.peak = psutil.Process(pid), threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while True:
            with suppress(psutil.Error):
                family = [self._process, *self._process.children(recursive=True)]
                self.peak = max(self.peak, sum(one.memory_info().rss for one in family))
            if self._done.wait(INTERVAL_S):
                return

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="a model folder")
    what.add_argument("--command", help="what upscales the folder {input} into the folder {output}")
    parser.add_argument("--name", default="ours", help="of the method")
    parser.add_argument("--size", type=parse_size, default=(480, 270), help="of the input, px: WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--vae-tile", type=int, help="px of the output, where memory is short")
    parser.add_argument("--transformer-tile", type=int, help="px of the output, where memory is short")
    parser.add_argument("--parameters-b", type=float, help="of a command, 10^9, for the table")
    parser.add_argument("--output", type=Path, help="folder in which NAME.method.yaml is written")
    arguments = parser.parse_args()
    for name in ("frames", "repeats"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: it must be at least 1")
    width, height = arguments.size
    frames = moving(width, height, arguments.frames)
    found = time_command(frames, arguments) if arguments.command else time_model(frames, arguments)

    medians = {step: statistics.median(values) for step, values in found["seconds"].items()}
    total = statistics.median(map(sum, zip(*found["seconds"].values(), strict=True)))
    billions = sum(found["parameters"].values()) / 1e9 or arguments.parameters_b
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "CPU"
    print(f"{arguments.name}: {arguments.frames} frames, {width}x{height} to {width * SCALE}x{height * SCALE}, {where}")
    for step, seconds in medians.items():
        spread = f"{min(found['seconds'][step]):.3f} … {max(found['seconds'][step]):.3f}"
        print(f"  {step:<12}{seconds:9.3f} s   ({spread})")
    print(f"  {'in all':<12}{total:9.3f} s   {arguments.frames / total:.2f} frames/s, {arguments.repeats} repeats")
    for part, count in found["parameters"].items():
        print(f"  {part:<12}{count / 1e9:9.4f} x 10^9 parameters")
    print(f"  {'peak memory':<12}{found['peak_bytes'] / 2**30:9.3f} GiB")
    if arguments.output:
        record = {"seconds": round(total, 3), **({"parameters_b": round(billions, 4)} if billions else {})}
        write_atomic(arguments.output / f"{arguments.name}.method.yaml", yaml.safe_dump(record))
    settings = {"dtype": arguments.dtype, "device": where, "size": [width, height], "frames": arguments.frames}
    print(json.dumps({"method": arguments.name, **settings, **found, "seconds_in_all": total, "seed": SEED}))


if __name__ == "__main__":
    run_command(main)
