"""What a sample costs the driver of the shard job, and samples/s, by where shards are written.

    python benchmarks/plumbing.py [--samples 128] [--output DIR]

Tasks stand in for decoding and degrading, an actor for encoding: rows of random bytes of the real sizes (a clip of
21 x 704 x 1280: latents of 5.4 MB, with clips 21 MB), made as cheaply as can be, so that the rates are the plumbing's.
`nobody` drops the rows: the rate of these producers. `driver` fetches, hashes and writes them in the process that
plans, as the job did before. `writers` is the job's way (datagen/shard_writing.py).

CPU time is that of the driver process with all its threads, Ray's included. It and the rates count from the first
block on, as a job has its start once: `start` is the CPU time until then. A part of it is spent by the second, not by
the sample: work beside, which lowers the rates, raises it. So the result tells the load. The last line is JSON;
`driver_ms_per_sample` is the worst of `writers`, `load_before` the mean number of processes that ran or waited in the
minute before.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from common.errors import run_command
from common.storage import LocalFolder, StorageConfig
from datagen.config import DatagenConfig
from datagen.dataset.shard_format import CommittedShard, Sample, write_shard
from datagen.dataset.shard_statistics import ShardStatistics
from datagen.encode.ray_jobs import EncodedBlock, samples_of
from datagen.encode.shard_writer import ShardWriters
from datagen.plan import Plan, SamplePlan
from datagen.ray_cluster import MAX_RETRIES, dataset_of, iterate_blocks, memory_ahead, start_ray, text_array
from datagen.shard_writing import write_shards

LATENT = (16, 6, 88, 160)
#: bytes of the stored LR and HR clip
CLIPS = {"latents": (0, 0), "latents and clips": (2_200_000, 13_400_000)}
SAMPLES_PER_SHARD = 64
CONFIG = DatagenConfig()


def plan_of(samples: int) -> Plan:
    plans = [
        SamplePlan(
            key=f"{number:016x}-0",
            clip=f"{number:016x}",
            source=f"video{number // 10}.mp4",
            content="0" * 64,
            path="/nowhere",
            caption="",
            start=21 * number,
            pts=None,
            frames=21,
            frames_per_second=25.0,
            crop=(0, 0, 704, 1280),
            variant=0,
            seed=number,
        )
        for number in range(samples)
    ]
    return Plan(plans, [], SAMPLES_PER_SHARD, "of the benchmark")


@functools.cache
def shared_noise() -> Any:
    """Shared memory, which each sample takes its bytes from at a place of its own."""
    return ray.put(np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8))


def stub_rows(plans: list[SamplePlan], clips: tuple[int, int]) -> ray.data.Dataset:
    """What `encode` has in its object stores at last, by tasks and actors as there."""
    noise = shared_noise()

    def degrade(table: pa.Table) -> pa.Table:
        (text,) = table["plans"].to_pylist()
        first = json.loads(text)[0]["seed"]
        lr, hr = (ray.get(noise)[first : first + size].tobytes() for size in clips)
        draws = [{"recipe": "stub", "lr_psnr_db": 30.0, "operations": []}]
        return pa.table(
            {
                "plans": text_array([text]),
                "faults": text_array(["[null]"]),
                "draws": text_array([json.dumps(draws)]),
                "reused": [False],
                "lr.mkv": pa.array([[lr]], pa.list_(pa.large_binary())),
                "hr.mkv": pa.array([hr], pa.large_binary()),
            }
        )

    class Encoder:
        def __call__(self, table: pa.Table) -> pa.Table:
            from safetensors.numpy import save

            latents = []
            for text in table["plans"].to_pylist():
                first = json.loads(text)[0]["seed"]
                latent = ray.get(noise)[first:][: math.prod(LATENT)].reshape(LATENT).astype(np.float16)
                latents.append([save({"z_hr": latent, "z_lr": latent})])
            return table.append_column("latents", pa.array(latents, pa.list_(pa.large_binary())))

    rows = [{"plans": json.dumps([asdict(plan)])} for plan in plans]
    return (
        dataset_of(rows)
        .map_batches(degrade, batch_size=1, batch_format="pyarrow", num_cpus=1, max_retries=MAX_RETRIES)
        .map_batches(Encoder, batch_size=1, batch_format="pyarrow", compute=ActorPoolStrategy(size=1), num_cpus=1)
    )


class Clock:
    """CPU and wall time since a first block of some samples, s."""

    samples = 0

    def start(self, samples: int) -> None:
        if not self.samples:
            self.samples, self._cpu, self._wall = samples, time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        return time.process_time() - self._cpu, time.perf_counter() - self._wall


def blocks_of(plans: list[SamplePlan], clips: tuple[int, int], clock: Clock) -> Generator[EncodedBlock]:
    with closing(iterate_blocks(stub_rows(plans, clips))) as blocks:
        for reference, rows, size in blocks:
            clock.start(rows)
            yield EncodedBlock(reference, rows, size)


def by_nobody(folder: LocalFolder, plan: Plan, clips: tuple[int, int], clock: Clock) -> list[CommittedShard]:
    """What the producers and their order cost."""
    with closing(blocks_of(plan.samples, clips, clock)) as blocks:
        assert sum(block.samples for block in blocks) == len(plan.samples)
    return []


def by_driver(folder: LocalFolder, plan: Plan, clips: tuple[int, int], clock: Clock) -> list[CommittedShard]:
    """As the job wrote before its writers, kept here to compare with."""
    sidecars: list[CommittedShard] = []
    with closing(blocks_of(plan.samples, clips, clock)) as blocks:
        encoded = (s for block in blocks for s in samples_of(ray.get(block.reference), {}, 0, block.samples))
        for index, shard in enumerate(plan.shards()):
            statistics = ShardStatistics()

            def samples(count: int, statistics: ShardStatistics) -> Generator[Sample]:
                for _ in range(count):
                    made = next(encoded).made
                    assert isinstance(made, Sample)
                    statistics.add(made)
                    yield made

            extra = {"plan": plan.hash, "failed": [], "statistics": statistics.record}
            sidecars.append(write_shard(folder, index, samples(len(shard), statistics), extra))
    return sidecars


def by_writers(folder: LocalFolder, plan: Plan, clips: tuple[int, int], clock: Clock) -> list[CommittedShard]:
    return write_shards(
        plan,
        {},
        lambda samples: blocks_of(samples, clips, clock),
        lambda: ShardWriters(folder, StorageConfig(), plan.hash, {}, memory_ahead(CONFIG) // 4),
    )


def measure(
    write: Callable[..., list[CommittedShard]], samples: int, clips: tuple[int, int], output: Path
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=output) as name:
        plan, clock, start = plan_of(samples), Clock(), time.process_time()
        sidecars = write(LocalFolder(name), plan, clips, clock)
        whole = time.process_time() - start
        cpu, wall = clock.read()
    counted = samples - clock.samples
    return {
        "driver_ms_per_sample": round(cpu / counted * 1e3, 1),
        "samples_per_s": round(counted / wall, 1),
        "start_ms": round((whole - cpu) * 1e3),
        "mb_per_sample": round(sum(sidecar.bytes for sidecar in sidecars) / samples / 1e6, 1),
        "sha256": [sidecar.sha256 for sidecar in sidecars],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=128, help="of each size and way")
    parser.add_argument("--workers", type=int, help="tasks at once; default: one per CPU")
    parser.add_argument("--output", type=Path, help="where temporary datasets are written; default: the system's place")
    arguments = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    start_ray(None, arguments.workers, CONFIG)
    ways = {"nobody": by_nobody, "driver": by_driver, "writers": by_writers}
    print(
        "| sample | written by | MB | driver, ms of CPU a sample | samples/s | start, ms |\n|---|---|---|---|---|---|",
        flush=True,
    )
    results: dict[str, Any] = {}
    for write in ways.values():  # processes start and load what they need
        measure(write, 16, CLIPS["latents"], arguments.output)
    for size, clips in CLIPS.items():
        for way, write in ways.items():
            found = measure(write, arguments.samples, clips, arguments.output)
            results[f"{size}, {way}"] = found
            print(
                f"| {size} | {way} | {found['mb_per_sample']} | {found['driver_ms_per_sample']} "
                f"| {found['samples_per_s']} | {found['start_ms']} |",
                flush=True,
            )
        assert results[f"{size}, driver"]["sha256"] == results[f"{size}, writers"]["sha256"], "the bytes differ"
    ray.shutdown()
    for found in results.values():
        del found["sha256"]
    worst = max(found["driver_ms_per_sample"] for name, found in results.items() if name.endswith("writers"))
    print(
        json.dumps({"driver_ms_per_sample": worst, "samples": arguments.samples, "load_before": load, "runs": results})
    )


if __name__ == "__main__":
    run_command(main)
