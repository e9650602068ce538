"""Shards by writer actors: the same bytes as by one process, also where a writer is killed; too many failed samples."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Generator, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import ray
import torch
from safetensors.torch import save

from common.errors import StorageError, UserError
from common.storage import StorageConfig, open_folder
from datagen.encode.clip import Fault
from datagen.encode.ray_jobs import UNREACHABLE, EncodedBlock, clips_of, samples_of
from datagen.encode.shard_writer import ShardWriter, ShardWriters
from datagen.job_folder import committed_shards, without_failed
from datagen.plan import Plan, SamplePlan, make_plan
from datagen.ray_cluster import text_array
from datagen.shard_writing import MAX_LOST, write_shards
from tests.datagen.conftest import contents
from tests.datagen.test_plan import CONFIG, surveyed

pytestmark = pytest.mark.distributed

#: three variants of a clip travel in a row, which a shard of five ends within
PLAN = make_plan(
    [surveyed(str(n)) for n in range(8)], CONFIG.model_copy(update={"variants": 3, "samples_per_shard": 5}), {}
)


def row(plans: list[SamplePlan], faults: list[Fault | None]) -> pa.Table:
    """What the VAE actor gives of a clip."""
    draws = {"recipe": "a", "lr_psnr_db": 30.0, "operations": []}
    binary = pa.large_binary()
    return pa.table(
        {
            "plans": text_array([json.dumps([asdict(plan) for plan in plans])]),
            "faults": text_array([json.dumps([fault and asdict(fault) for fault in faults])]),
            "draws": text_array([json.dumps([draws] * len(plans))]),
            "reused": [False],
            "lr.mkv": pa.array([[b"lr"] * len(plans)], pa.list_(binary)),
            "hr.mkv": pa.array([b"hr"], binary),
            "latents": pa.array(
                [[save({"z_hr": torch.full((2, 1, 4, 4), float(plan.seed % 100))}) for plan in plans]], pa.list_(binary)
            ),
        }
    )


def blocks(plans: list[SamplePlan], failing: AbstractSet[str]) -> Iterator[tuple[pa.Table, int]]:
    """Blocks of up to two clips with the number of their samples; those with these keys failed."""
    clips = clips_of(plans)
    while pair := list(itertools.islice(clips, 2)):
        rows = [row(clip, [Fault("broke") if plan.key in failing else None for plan in clip]) for clip in pair]
        yield pa.concat_tables(rows), sum(map(len, pair))


def encoded(
    failing: AbstractSet[str] = frozenset(), after_each: Callable[[], None] = lambda: None
) -> Callable[[list[SamplePlan]], Generator[EncodedBlock]]:
    """What stands for `encode`: blocks that lie in Ray's object store already."""

    def encode(plans: list[SamplePlan]) -> Generator[EncodedBlock]:
        for block, samples in blocks(plans, failing):
            yield EncodedBlock(ray.put(block), samples, block.nbytes)
            after_each()

    return encode


def writers(folder: Path, plan: Plan, ahead: int = 1) -> Callable[[], ShardWriters]:
    return lambda: ShardWriters(open_folder(folder), StorageConfig(), plan.hash, {}, ahead)


def kill_writers() -> int:
    """SIGKILL to all processes that write shards; how many there were."""
    found = [process for process in psutil.Process().children(recursive=True) if is_writer(process)]
    for process in found:
        os.kill(process.pid, signal.SIGKILL)
    return len(found)


def is_writer(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::ShardActor")
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Written by this process, one shard after the other; the last clip failed."""
    path = tmp_path_factory.mktemp("expected")
    writer = ShardWriter(open_folder(path), PLAN.hash)
    samples = (s for block, count in blocks(PLAN.samples, LAST) for s in samples_of(block, {}, 0, count))
    for index, shard in enumerate(PLAN.shards()):
        writer.add(index, itertools.islice(samples, len(shard)))
        writer.commit(index, PLAN.split_of(index))
    return contents(path)


LAST = {plan.key for plan in PLAN.samples if plan.clip == PLAN.samples[-1].clip}


@pytest.mark.parametrize("ahead", [1, 2**30])
def test_writers_give_the_same_bytes(shared_ray: None, expected: dict[str, bytes], tmp_path: Path, ahead: int) -> None:
    shards = write_shards(PLAN, {}, encoded(LAST), writers(tmp_path, PLAN, ahead))
    assert [shard.samples for shard in shards] == [5, 5, 5, 5, 1]
    assert contents(tmp_path) == expected


def test_a_killed_writer_costs_nothing(shared_ray: None, expected: dict[str, bytes], tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_once() -> None:
        if not killed and committed_shards(open_folder(tmp_path), PLAN):
            killed.append(kill_writers())

    write_shards(PLAN, {}, encoded(LAST, kill_once), writers(tmp_path, PLAN))
    assert killed[0] > 0 and contents(tmp_path) == expected


def test_writers_that_always_end_are_said(shared_ray: None, tmp_path: Path) -> None:
    # one shard, to which the first of four blocks is added before each kill
    plan = make_plan([surveyed(str(n)) for n in range(8)], CONFIG.model_copy(update={"samples_per_shard": 8}), {})
    killed: list[int] = []
    with pytest.raises(UserError, match=f"have ended {MAX_LOST} times without a shard in between"):
        write_shards(plan, {}, encoded(after_each=lambda: killed.append(kill_writers())), writers(tmp_path, plan))
    assert len(plan.shards()) == 1 and sum(killed) == MAX_LOST and contents(tmp_path) == {}


def test_a_file_out_of_reach_ends_the_job_before_its_shard(shared_ray: None, tmp_path: Path) -> None:
    def encode(plans: list[SamplePlan]) -> Generator[EncodedBlock]:
        block = row(plans[:3], [Fault("a.mkv cannot be read", UNREACHABLE)] * 3)
        yield EncodedBlock(ray.put(block), 3, block.nbytes)

    with pytest.raises(StorageError, match=r"a\.mkv cannot be read"):
        write_shards(PLAN, {}, encode, writers(tmp_path, PLAN))
    assert contents(tmp_path) == {}


def written(folder: Path, plan: Plan, failing: AbstractSet[int] = frozenset(), max_failed: float = 0.1) -> list[int]:
    """Write the shards of `plan` but for the samples at these positions; how many samples each holds."""
    keys = {plan.samples[number].key for number in failing}
    committed = committed_shards(open_folder(folder), plan)
    made = write_shards(plan, committed, encoded(keys), writers(folder, plan), max_failed)
    return [shard.samples for shard in made]


def test_too_many_failed_samples_stop_the_job_before_their_shard_is_committed(shared_ray: None, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"samples_per_shard": 30})
    plan = make_plan([surveyed(str(index)) for index in range(120)], config, {})
    with pytest.raises(UserError, match=r"11 of 30 samples of a shard failed, .* max_failed = 0\.1 allows; .* broke"):
        written(tmp_path / "a", plan, {0, *range(30, 41)}, 0.1)
    assert sorted(committed_shards(open_folder(tmp_path / "a"), plan)) == [0]
    with pytest.raises(UserError, match="16 of 120 samples of the job failed"):
        written(tmp_path / "b", plan, {*range(8), *range(30, 38)}, 0.13)
    assert written(tmp_path / "c", plan, {*range(10)}, 0) == [20, 30, 30, 30]
    # shards that have no sample wait for the first one, as the VAE may give none
    plan_of_two = make_plan([surveyed(str(index)) for index in range(24)], CONFIG, {})
    with pytest.raises(UserError, match="12 of 24 samples of the job failed"):
        written(tmp_path / "e", plan_of_two, {*range(24)}, 0.1)
    assert contents(tmp_path / "e") == {}
    assert written(tmp_path / "f", plan_of_two, {*range(5), 6}, 0.1)[:5] == [0, 0, 1, 1, 2]
    small = make_plan([surveyed("a"), surveyed("b")], config, {})
    with pytest.raises(UserError, match="2 of 2 samples of a shard failed"):
        written(tmp_path / "d", small, {0, 1}, 0.1)
    # --retry-failed: only what lacks samples is made again
    folder = open_folder(tmp_path / "c")
    assert sorted(without_failed(folder, committed_shards(folder, plan))) == [1, 2, 3]
    assert written(tmp_path / "c", plan, set(), 0.1) == [30, 30, 30, 30]
