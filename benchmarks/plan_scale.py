"""Time and memory of the plan, duplicates included, for surveys of many sources.

    python benchmarks/plan_scale.py                      # 10,000 and 100,000 sources of 10 windows
    python benchmarks/plan_scale.py --sources 1000       # another number

The surveys are made up, of the types that the survey returns. A source's hashes change by a few bits from window to
window, as in one scene, and by all of them at a cut; one source of fifty is a copy of another with up to ten bits
changed in each hash. Each number of sources runs in a process of its own, whose peak memory holds everything: Python
and its libraries, the surveys, and the plan. The last line is JSON of the largest number: `seconds` of duplicates and
plan, `peak_gb`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from typing import Any

import numpy as np

from common.errors import run_command
from datagen.config import DatagenConfig
from datagen.plan import make_plan
from datagen.sources import Source
from datagen.survey.source_survey import SourceSurvey, Window

WINDOWS = 10
FRAMES = 21
#: windows between two cuts, on average
WINDOWS_PER_SCENE = 3
#: one source of so many is a copy
COPY_EVERY = 50
BITS = 64


def hashes_of(sources: int, rng: np.random.Generator) -> np.ndarray:
    """uint64 (sources, WINDOWS, 3)."""
    frames = WINDOWS * 3
    hashes = rng.integers(0, 2**BITS, (sources, frames), dtype=np.uint64)
    cut = rng.random((sources, frames)) < 1 / (3 * WINDOWS_PER_SCENE)
    for frame in range(1, frames):
        hashes[:, frame] = np.where(cut[:, frame], hashes[:, frame], _changed(hashes[:, frame - 1], 6, rng))
    copies = np.arange(COPY_EVERY - 1, sources, COPY_EVERY)
    originals = rng.integers(0, np.maximum(copies - 1, 1))
    hashes[copies] = _changed(hashes[originals], 10, rng)
    return hashes.reshape(sources, WINDOWS, 3)


def _changed(values: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Values with 0...most bits changed."""
    changes = rng.integers(0, most + 1, values.shape)
    for change in range(most):
        bit = np.uint64(1) << rng.integers(0, BITS, values.shape, dtype=np.uint64)
        values = np.where(change < changes, values ^ bit, values)
    return values


def surveys_of(sources: int, seed: int) -> list[SourceSurvey]:
    """Surveys of 720p sources that pass the filters."""
    hashes = hashes_of(sources, np.random.default_rng(seed))
    surveys = []
    for number in range(sources):
        windows = tuple(
            Window(
                start=FRAMES * index,
                pts=FRAMES * index * 512,
                luma=100.0 + index,
                contrast=40.0 + index,
                motion=2.0 + index,
                sharpness=100.0 + index,
                novelty=20.0 + index,
                hashes=tuple(f"{value:016x}" for value in hashes[number, index].tolist()),
            )
            for index in range(WINDOWS)
        )
        name = f"folder{number % 100}/video{number}.mp4"
        surveys.append(
            SourceSurvey(
                Source(name, f"/data/{name}"),
                width=1280,
                height=720,
                frames=FRAMES * WINDOWS,
                frames_per_second=25.0,
                content=f"{number:064x}",
                cuts=(),
                windows=windows,
            )
        )
    return surveys


def measure(sources: int, seed: int) -> dict[str, Any]:
    """Windows, duplicates, samples, seconds, and this process's peak memory in GB of 1e9 bytes."""
    surveys = surveys_of(sources, seed)
    start = time.perf_counter()
    plan = make_plan(surveys, DatagenConfig(), {"vae": "of the benchmark"})
    seconds = time.perf_counter() - start
    return {
        "sources": sources,
        "windows": sources * WINDOWS,
        "duplicates": len(plan.rejected),
        "samples": len(plan.samples),
        "seconds": round(seconds, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=int, nargs="+", default=[10_000, 100_000], help="numbers of sources")
    parser.add_argument("--seed", type=int, default=0, help="of the hashes")
    arguments = parser.parse_args()
    print("| sources | windows | duplicates | samples | seconds | µs a window | peak memory, GB |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    result: dict[str, Any] = {}
    for sources in sorted(arguments.sources):
        # a process of its own: peak memory never falls
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(measure, (sources, arguments.seed))
        per_window = result["seconds"] / result["windows"] * 1e6
        print(
            f"| {result['sources']:,} | {result['windows']:,} | {result['duplicates']:,} | {result['samples']:,} "
            f"| {result['seconds']:.1f} | {per_window:.0f} | {result['peak_gb']:.2f} |",
            flush=True,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
