"""The command with the full and with the fast codec on the same long video: seconds and memory of the whole process.

    python benchmarks/codec_video.py [--models small wan] [--seconds 60 --rate 5 --size 32x32]

`small` is assets/small, whose fast decoder has the widths of its VAE's decoder: it is there for what it shows. `wan`
has Wan2.1's VAE, the middle fast codec of benchmarks/codec.py and a DiT of 0.1 M parameters, all of random weights, so
that the codec is what costs. Every run is the real command in a process of its own, on one thread. Memory is the peak
of its resident memory, weights and libraries included. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, from anywhere

from benchmarks.codec import codecs
from benchmarks.upscale import moving
from common.errors import UserError, run_command
from common.video_writer import VideoWriter
from pipeline.latent_codec import FastCodec
from pipeline.model.prompts import placeholder_cache
from pipeline.model.transformer import VSRTransformer
from pipeline.output_size import parse_size
from pipeline.upscale_options import DEFAULT_MODEL
from pipeline.vsr_pipeline import VSRPipeline

GIB = 2**30
LOOK_EVERY_S = 0.05


def wan_model(folder: Path) -> Path:
    """A model folder with Wan2.1's VAE, the middle fast codec and a DiT that costs next to nothing; random weights."""
    torch.manual_seed(0)
    transformer = VSRTransformer(
        num_layers=2, num_attention_heads=2, attention_head_dim=24, text_dim=8, ffn_dim=64, freq_dim=32
    )
    codec = codecs()["middle"]
    assert isinstance(codec, FastCodec)
    prompts = placeholder_cache(8, 4)
    VSRPipeline(transformer, codec.vae, prompts, codec.decoder, codec.encoder).save_pretrained(folder)
    return folder


#: name -> makes or finds the model folder, given an empty one
MODELS: dict[str, Callable[[Path], Path]] = {"small": lambda folder: DEFAULT_MODEL, "wan": wan_model}


def peak_resident(process: int) -> int:
    """Bytes, so far; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def measured(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds, those of FFmpeg included, and the peak of resident memory, that of Python."""
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        peak, ended = 0, 0
        while not ended:
            time.sleep(LOOK_EVERY_S)
            peak = max(peak, peak_resident(process.pid))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            said = log.read().decode()[-2000:]
            raise UserError(f"{' '.join(command)} ended with status {process.returncode}:\n{said}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_gib": peak / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--seconds", type=int, default=60, help="of the video")
    parser.add_argument("--rate", type=int, default=5, help="frames per second")
    parser.add_argument("--size", type=parse_size, default=(32, 32), help="of the video, px")
    arguments = parser.parse_args()
    width, height = arguments.size
    found: dict[str, dict[str, float]] = {}
    print("| model | codec | wall, s | CPU, s | peak memory, GiB |", "|---" * 5 + "|", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.mp4"
        with VideoWriter(source, width=width, height=height, frame_rate=Fraction(arguments.rate), crf=10) as writer:
            writer.write(moving(width, height, arguments.seconds * arguments.rate))
        for name in arguments.models:
            model = MODELS[name](Path(folder) / name)
            for codec in ("full", "fast"):
                output = Path(folder) / f"{name}-{codec}.mp4"
                command = [sys.executable, "-m", "pipeline.upscale", str(source), str(output)]
                row = measured([*command, "--model", str(model), "--codec", codec, "--device", "cpu"])
                found[f"{name} {codec}"] = row
                numbers = f"{row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['peak_gib']:.2f}"
                print(f"| {name} | {codec} | {numbers} |", flush=True)
    settings = {"seconds": arguments.seconds, "rate": arguments.rate, "size": [width, height]}
    print(json.dumps({"video": settings, "cores": os.cpu_count(), "torch": torch.__version__, "rows": found}))


if __name__ == "__main__":
    run_command(main)
