"""Peak memory of metrics.evaluate on 10 s and on 100 s of video: the same, because frames are streamed.

    python benchmarks/evaluate_memory.py [--size 640x360] [--metrics psnr,ssim,…] [--seconds 10,100]

Both clips are made by FFmpeg (a moving test image, without loss, and a blurred copy) and scored by the command in a
process of its own. Its peak resident memory and that of the FFmpeg processes it starts are told apart. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, from anywhere

from common.errors import UserError, run_command
from common.video_probe import ffmpeg_binary

ROOT = Path(__file__).resolve().parents[1]
METRICS = "psnr,ssim,gmsd,niqe_fitted,vmaf,temporal,grid,noise"
FRAMES_PER_SECOND = 25
#: between two looks at the memory
INTERVAL_S = 0.02


def make_clips(folder: Path, size: str, seconds: int) -> tuple[Path, Path]:
    """HR and a blurred copy, FFV1."""
    source = ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate={FRAMES_PER_SECOND}:duration={seconds}"]
    paths = folder / f"{seconds}-hr.mkv", folder / f"{seconds}-out.mkv"
    for path, effect in zip(paths, ("null", "gblur=1"), strict=True):
        command = [ffmpeg_binary(), "-v", "error", "-y", *source, "-vf", effect, "-c:v", "ffv1", str(path)]
        subprocess.run(command, check=True)
    return paths


def peak_mib(folder: Path, seconds: int, size: str, metrics: str) -> dict[str, float]:
    """Peak resident memory of the command, and of all the programs it starts together."""
    high, video = make_clips(folder, size, seconds)
    model = folder / "niqe.safetensors"
    if not model.is_file():
        fit = ["--input", str(high), "--output", str(model), "--frame-step", "10", "--sharpness", "0.1"]
        command = [sys.executable, "-m", "metrics.fit_niqe", *fit, "--block", "48"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    line = ["--video", video, "--reference", high, "--metrics", metrics, "--niqe-model", model]
    line += ["--output", folder / "metrics.json"]
    command = [sys.executable, "-m", "metrics.evaluate", *map(str, line)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        process = psutil.Process(running.pid)
        own = programs = 0
        while running.poll() is None:
            with suppress(psutil.NoSuchProcess):
                own = max(own, process.memory_info().rss)
                programs = max(programs, sum(_resident(child) for child in process.children(recursive=True)))
            time.sleep(INTERVAL_S)
    if running.returncode:
        raise UserError(f"{' '.join(command)} ended with status {running.returncode}")
    return {"command": round(own / 2**20, 1), "programs": round(programs / 2**20, 1)}


def _resident(process: psutil.Process) -> int:
    """Memory of a program; a copy of the parent that has not become one yet does not count."""
    try:
        return process.memory_info().rss if process.name().startswith("ffmpeg") else 0
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="640x360", help="WIDTHxHEIGHT")
    parser.add_argument("--metrics", default=METRICS)
    parser.add_argument("--seconds", default="10,100", help="lengths, separated by commas")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for seconds in map(int, arguments.seconds.split(",")):
            peaks[seconds] = peak_mib(Path(folder), seconds, arguments.size, arguments.metrics)
            held = 2 * seconds * FRAMES_PER_SECOND * width * height * 3 * 4 / 2**20
            print(f"{seconds} s: {peaks[seconds]} MiB; both clips as float32: {held:.0f} MiB")
    print(json.dumps({"size": arguments.size, "metrics": arguments.metrics.split(","), "peak_mib": peaks}))


if __name__ == "__main__":
    run_command(main)
