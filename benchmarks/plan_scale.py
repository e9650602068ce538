"""Time and memory of the plan, duplicates included, for surveys of many sources.

    python benchmarks/plan_scale.py                      # 10,000 and 100,000 sources of 10 windows
    python benchmarks/plan_scale.py --sources 1000       # another number

The surveys are made up, of the types that the survey returns. A source's hashes change by a few bits from window to
window, as in one scene, and by all of them at a cut; one source of fifty is a copy of another with up to ten bits
changed in each hash. Each number of sources runs in a process of its own, whose peak memory holds everything: Python
and its libraries, the surveys, and the plan.

Then a restart: what a job reads before it can go on, from a local folder of 8,000 committed shards of 64 samples (the
tars are empty files of the right size) and the surveys of 10,000 sources. And the index of these shards, which a job
writes at its end and each rank of a training reads. The last line is JSON of the largest number: `seconds` of
duplicates and plan, `peak_gb`, and `restart_seconds` of surveys and committed shards.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import run_command
from common.storage import LocalFolder, StorageConfig
from datagen.config import DatagenConfig
from datagen.dataset.shard_format import Sidecar, Span, shard_name, sidecar_name
from datagen.dataset.shard_index import read_index, write_index
from datagen.job_folder import committed_shards
from datagen.plan import Plan, make_plan
from datagen.sources import Source
from datagen.survey.source_survey import SourceSurvey, Window, to_document
from datagen.survey.survey_cache import SURVEYS_PER_FILE, survey_all, survey_keys

WINDOWS = 10
FRAMES = 21
#: windows between two cuts, on average
WINDOWS_PER_SCENE = 3
#: one source of so many is a copy
COPY_EVERY = 50
BITS = 64
#: of a shard of the restart
SAMPLES, MEMBERS = 64, ("latents.safetensors", "lr.mkv", "hr.mkv", "json")
CONFIG = DatagenConfig()


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
    """Windows, duplicates, samples, seconds, seconds of CPU, and this process's peak memory in GB of 1e9 bytes."""
    surveys = surveys_of(sources, seed)
    cpu, start = time.process_time(), time.perf_counter()
    plan = make_plan(surveys, DatagenConfig(), {"vae": "of the benchmark"})
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
    return {
        "sources": sources,
        "windows": sources * WINDOWS,
        "duplicates": len(plan.rejected),
        "samples": len(plan.samples),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def measure_restart(shards: int, sources: int, seed: int) -> dict[str, float]:
    """Seconds that reading surveys and committed shards takes, and of CPU time, which a busy machine leaves alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = LocalFolder(name)
        surveys = surveys_of(sources, seed)
        given = [found.source for found in surveys]
        documents = [
            {"of": key} | to_document(found) for key, found in zip(survey_keys(given, CONFIG), surveys, strict=True)
        ]
        for number, first in enumerate(range(0, sources, SURVEYS_PER_FILE)):
            part = {"surveys": documents[first : first + SURVEYS_PER_FILE]}
            folder.write(f"survey/part-{number:06d}.json", json.dumps(part).encode())
        statistics = {"counts": {"recipe": {"a": SAMPLES}, "source": {f"video{n}.mp4": 1 for n in range(SAMPLES)}}}
        statistics |= {"lr_psnr_db": [30.123] * SAMPLES}
        statistics |= {
            "latents": {z: {"values": 1, "sum": [0.1] * 16, "squares": [0.1] * 16} for z in ("z_hr", "z_lr")}
        }
        for shard in range(shards):
            sidecar = Sidecar(
                name=shard_name(shard),
                samples=SAMPLES,
                bytes=SAMPLES * 21_000_000,
                sha256="0" * 64,
                keys=[f"{SAMPLES * shard + n:016x}-0" for n in range(SAMPLES)],
                members=[{m: Span(n, 1, n) for m in MEMBERS} for n in range(SAMPLES)],
                extra={"plan": "of the benchmark", "failed": [], "statistics": statistics},
            )
            path = Path(name, sidecar_name(sidecar.name))
            path.parent.mkdir(exist_ok=True)
            path.write_text(sidecar.model_dump_json())
            path.with_suffix(".tar").touch()
            os.truncate(path.with_suffix(".tar"), sidecar.bytes)
        samples = make_plan(surveys[: shards // WINDOWS + 1], CONFIG, {}).samples
        plan = Plan((samples * (shards // len(samples) + 1))[:shards], [], 1, "of the benchmark")
        cpu, start = time.process_time(), time.perf_counter()
        found = survey_all(folder, given, CONFIG, StorageConfig(), lambda: None)
        surveyed = time.perf_counter()
        committed = committed_shards(folder, plan)
        cpu, end = time.process_time() - cpu, time.perf_counter()
        assert found == surveys and len(committed) == shards
        indexed = time.perf_counter()
        write_index(folder, list(committed.values()))
        written = time.perf_counter()
        assert read_index(folder, list(committed.values())) is not None
        read = time.perf_counter()
    return {
        "index_written_seconds": round(written - indexed, 2),
        "index_read_seconds": round(read - written, 2),
        "surveys_seconds": round(surveyed - start, 2),
        "shards_seconds": round(end - surveyed, 2),
        "restart_seconds": round(end - start, 2),
        "restart_cpu_seconds": round(cpu, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=int, nargs="+", default=[10_000, 100_000], help="numbers of sources")
    parser.add_argument("--shards", type=int, default=8_000, help="committed shards of the restart")
    parser.add_argument("--surveys", type=int, default=10_000, help="surveyed sources of the restart")
    parser.add_argument("--seed", type=int, default=0, help="of the hashes")
    arguments = parser.parse_args()
    print(
        "| sources | windows | duplicates | samples | seconds | of CPU | µs of CPU a window | peak memory, GB |",
        flush=True,
    )
    print("|---" * 8 + "|", flush=True)
    result: dict[str, Any] = {}
    for sources in sorted(arguments.sources):
        # a process of its own: peak memory never falls
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(measure, (sources, arguments.seed))
        per_window = result["cpu_seconds"] / result["windows"] * 1e6
        print(
            f"| {result['sources']:,} | {result['windows']:,} | {result['duplicates']:,} | {result['samples']:,} "
            f"| {result['seconds']:.1f} | {result['cpu_seconds']:.1f} | {per_window:.0f} | {result['peak_gb']:.2f} |",
            flush=True,
        )
    restart = measure_restart(arguments.shards, arguments.surveys, arguments.seed)
    print(
        f"\nrestart: surveys of {arguments.surveys:,} sources {restart['surveys_seconds']} s, "
        f"{arguments.shards:,} committed shards {restart['shards_seconds']} s, CPU {restart['restart_cpu_seconds']} s\n"
        f"index of their samples: written in {restart['index_written_seconds']} s, read in "
        f"{restart['index_read_seconds']} s\n"
    )
    print(json.dumps(result | restart))


if __name__ == "__main__":
    run_command(main)
