"""Shards by writer actors: the same bytes as by one process, also where a writer is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
import torch
from safetensors.torch import save

from common.errors import StorageError
from common.storage import StorageConfig, open_folder
from datagen.encode.clip import Fault
from datagen.encode.ray_jobs import UNREACHABLE, EncodedBlock, samples_of
from datagen.encode.shard_writer import ShardWriters
from datagen.job_folder import committed_shards
from datagen.plan import SamplePlan, make_plan
from datagen.ray_cluster import text_array
from datagen.shard_writing import write_shards
from tests.datagen.conftest import contents
from tests.datagen.test_plan import CONFIG, surveyed
from tests.datagen.test_trouble import WritersHere

pytestmark = pytest.mark.distributed

#: three variants of a clip travel in a row, which a shard of five ends within
PLAN = make_plan(
    [surveyed(str(n)) for n in range(8)], CONFIG.model_copy(update={"variants": 3, "samples_per_shard": 5}), {}
)


def row(plans: list[SamplePlan], fault: Fault | None = None) -> dict[str, list[Any]]:
    """What the VAE actor gives of a clip."""
    latents = [save({"z_hr": torch.full((2, 1, 4, 4), float(plan.variant))}) for plan in plans]
    draws = {"recipe": "a", "lr_psnr_db": 30.0, "operations": []}
    return {
        "plans": [json.dumps([asdict(plan) for plan in plans])],
        "faults": [json.dumps([asdict(fault) if fault else None] * len(plans))],
        "draws": [json.dumps([draws] * len(plans))],
        "reused": [False],
        "lr.mkv": [[b"lr"] * len(plans)],
        "hr.mkv": [b"hr"],
        "latents": [latents],
    }


def table(plans: list[SamplePlan], fault: Fault | None = None) -> pa.Table:
    columns = row(plans, fault)
    texts = {name: text_array(columns[name]) for name in ("plans", "faults", "draws")}
    binary = pa.large_binary()
    stored = {"hr.mkv": pa.array(columns["hr.mkv"], binary), "reused": columns["reused"]}
    lists = {name: pa.array(columns[name], pa.list_(binary)) for name in ("lr.mkv", "latents")}
    return pa.table(texts | stored | lists)


def tables(plans: list[SamplePlan]) -> list[tuple[pa.Table, int]]:
    """Blocks of up to two rows with the number of their samples; the last clip failed."""
    clips: dict[str, list[SamplePlan]] = {}
    for plan in plans:
        clips.setdefault(plan.clip, []).append(plan)
    rows = [table(clip, Fault("broke") if clip[0].clip == PLAN.samples[-1].clip else None) for clip in clips.values()]
    counts = [len(clip) for clip in clips.values()]
    return [
        (pa.concat_tables(rows[first : first + 2]), sum(counts[first : first + 2])) for first in range(0, len(rows), 2)
    ]


def stored(plans: list[SamplePlan]) -> Generator[EncodedBlock]:
    for block, samples in tables(plans):
        yield EncodedBlock(ray.put(block), samples, block.nbytes)


def writers(folder: Path) -> ShardWriters:
    return ShardWriters(open_folder(folder), StorageConfig(), PLAN.hash, {}, ahead=1)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Written by this process, one block after the other."""
    path = tmp_path_factory.mktemp("expected")

    def here(plans: list[SamplePlan]) -> Generator[EncodedBlock]:
        for block, samples in tables(plans):
            yield EncodedBlock(list(samples_of(block, {}, 0, samples)), samples, 1)

    shards = write_shards(PLAN, {}, here, lambda: WritersHere(open_folder(path), PLAN))
    assert [shard.samples for shard in shards] == [5, 5, 5, 5, 1]
    return contents(path)


def test_writers_give_the_same_bytes(shared_ray: None, expected: dict[str, bytes], tmp_path: Path) -> None:
    write_shards(PLAN, {}, stored, lambda: writers(tmp_path))
    assert contents(tmp_path) == expected


def test_a_killed_writer_costs_nothing(shared_ray: None, expected: dict[str, bytes], tmp_path: Path) -> None:
    killed: list[int] = []

    def encoded(plans: list[SamplePlan]) -> Generator[EncodedBlock]:
        for block in stored(plans):
            yield block
            if not killed and committed_shards(open_folder(tmp_path), PLAN):
                for process in psutil.Process().children(recursive=True):
                    if " ".join(process.cmdline()).startswith("ray::ShardActor"):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)

    write_shards(PLAN, {}, encoded, lambda: writers(tmp_path))
    assert len(killed) == 1 and contents(tmp_path) == expected


def test_a_file_out_of_reach_ends_the_job_before_its_shard(shared_ray: None, tmp_path: Path) -> None:
    def encoded(plans: list[SamplePlan]) -> Generator[EncodedBlock]:
        block = table(plans[:3], Fault("a.mkv cannot be read", UNREACHABLE))
        yield EncodedBlock(ray.put(block), 3, block.nbytes)

    with pytest.raises(StorageError, match=r"a\.mkv cannot be read"):
        write_shards(PLAN, {}, encoded, lambda: writers(tmp_path))
    assert contents(tmp_path) == {}
