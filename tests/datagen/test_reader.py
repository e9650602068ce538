"""The reader: one order for any number of ranks, exact positions, damage that all ranks see alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest

from common.errors import UserError
from common.storage import open_folder
from datagen.dataset.loader import ShardReader
from datagen.dataset.shard_format import Sample, read_manifest, read_sidecar, shard_name, write_shard
from datagen.dataset.shard_index import INDEX, read_index, write_index
from datagen.dataset.verify import faults
from tests.datagen.conftest import SHARD_SIZES

SAMPLES = sum(SHARD_SIZES)


def numbers(reader: ShardReader, batches: int) -> list[list[int]]:
    return [[row["number"] for row in batch.metadata] for batch in itertools.islice(reader, batches)]


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def global_batches(dataset: Path, world_size: int, batches: int, **more: object) -> list[list[int]]:
    """Global batches put together from those of all ranks."""
    ranks = [
        numbers(
            ShardReader(dataset, seed=5, global_batch_size=4, rank=rank, world_size=world_size, **more),  # type: ignore[arg-type]
            batches,
        )
        for rank in range(world_size)
    ]
    return [joined(parts) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_sample_once_per_epoch_for_any_number_of_ranks(dataset: Path, world_size: int) -> None:
    stream = joined(global_batches(dataset, world_size, 2 * SAMPLES // 4))
    assert sorted(stream[:SAMPLES]) == sorted(stream[SAMPLES:]) == list(range(SAMPLES))
    assert stream[:SAMPLES] != stream[SAMPLES:]
    assert stream == joined(global_batches(dataset, 1, 2 * SAMPLES // 4))


def test_the_seed_decides_the_order(dataset: Path) -> None:
    one = numbers(ShardReader(dataset, seed=1, global_batch_size=6), 3)
    assert one == numbers(ShardReader(dataset, seed=1, global_batch_size=6), 3)
    assert one != numbers(ShardReader(dataset, seed=2, global_batch_size=6), 3)


def test_tensors_belong_to_their_metadata(dataset: Path) -> None:
    batch = next(iter(ShardReader(dataset, seed=0, global_batch_size=3)))
    assert batch.tensors["z_hr"].shape == (3, 2, 1, 4, 4)
    for index, row in enumerate(batch.metadata):
        assert (batch.tensors["z_hr"][index] == row["number"]).all()
        assert batch.keys[index] == f"key{row['number']:03d}"


def test_a_dataset_smaller_than_the_batch_goes_round(dataset: Path) -> None:
    first = numbers(ShardReader(dataset, seed=0, global_batch_size=2 * SAMPLES), 1)[0]
    assert sorted(first) == sorted(2 * list(range(SAMPLES)))


@pytest.mark.parametrize("consumed", [1, 4, 7])
def test_a_position_resumes_exactly_on_another_number_of_ranks(dataset: Path, consumed: int) -> None:
    whole = global_batches(dataset, 1, 10)
    writer = ShardReader(dataset, seed=5, global_batch_size=4, rank=1, world_size=2)
    iterator = iter(writer)
    for _ in range(consumed):
        next(iterator)
    state = writer.state_dict()
    resumed = []
    for rank in range(4):
        reader = ShardReader(dataset, seed=5, global_batch_size=4, rank=rank, world_size=4)
        reader.load_state_dict(state)
        resumed.append(numbers(reader, 10 - consumed))
    assert [joined(parts) for parts in zip(*resumed, strict=True)] == whole[consumed:]


def test_a_position_of_another_order_is_refused(dataset: Path) -> None:
    state = ShardReader(dataset, seed=1, global_batch_size=2).state_dict()
    with pytest.raises(UserError, match="seed 1"):
        ShardReader(dataset, seed=2, global_batch_size=2).load_state_dict(state)
    with pytest.raises(UserError, match="another dataset"):
        ShardReader(dataset, seed=1, global_batch_size=2).load_state_dict(state | {"dataset": "0"})


def cut_shard(dataset: Path) -> None:
    path = dataset / shard_name(0)
    path.write_bytes(path.read_bytes()[:700])


def test_a_cut_shard_is_left_out_identically_on_all_ranks(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut_shard(dataset)
    left = list(range(SHARD_SIZES[0], SAMPLES))
    stream = joined(global_batches(dataset, 2, len(left)))
    assert sorted(stream[: len(left)]) == left
    assert stream == joined(global_batches(dataset, 1, len(left)))
    assert "shard-000000.tar has 700 of" in caplog.text


def test_a_changed_sample_is_replaced_identically_on_all_ranks(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    span = read_sidecar(open_folder(dataset), shard_name(2)).members[3]["latents.safetensors"]
    path = dataset / shard_name(2)
    content = bytearray(path.read_bytes())
    content[span.offset + span.length - 1] ^= 1
    path.write_bytes(content)
    damaged = SHARD_SIZES[0] + SHARD_SIZES[1] + 3
    stream = joined(global_batches(dataset, 4, 2 * SAMPLES // 4))
    assert stream == joined(global_batches(dataset, 1, 2 * SAMPLES // 4))
    assert set(stream) == set(range(SAMPLES)) - {damaged}
    assert "has changed since it was written" in caplog.text


def test_damage_can_be_an_error(dataset: Path) -> None:
    cut_shard(dataset)
    with pytest.raises(UserError, match="has 700 of"):
        ShardReader(dataset, seed=0, global_batch_size=1, damaged="error")


def test_bad_arguments_are_named(dataset: Path) -> None:
    with pytest.raises(UserError, match="multiple of the 2 ranks"):
        ShardReader(dataset, seed=0, global_batch_size=3, world_size=2)
    with pytest.raises(UserError, match="no member 'hr'"):
        next(iter(ShardReader(dataset, members=("hr",), seed=0, global_batch_size=1)))


def test_the_index_stands_for_the_sidecars(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_folder(dataset)
    expected = global_batches(dataset, 1, 9)
    shards = read_manifest(folder).shards
    assert read_index(folder, shards) is None
    write_index(folder, shards)
    index = read_index(folder, shards)
    assert index is not None and read_index(folder, shards[1:]) is None
    for entry in shards:
        sidecar = read_sidecar(folder, entry.name)
        rows = range(entry.samples)
        assert [index.find(entry.name, row) for row in rows] == list(zip(sidecar.keys, sidecar.members, strict=True))
    assert list(faults(folder)) == []

    contents = {path: path.read_bytes() for path in dataset.glob("shards/*.json")}
    for path in contents:
        path.write_text("{")
    assert global_batches(dataset, 1, 9) == expected and not caplog.records, "a sidecar was read"
    for path, content in contents.items():
        path.write_bytes(content)
    damaged = (dataset / INDEX).read_bytes()
    (dataset / INDEX).write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    assert global_batches(dataset, 1, 9) == expected and read_index(folder, shards) is None
    assert list(faults(folder)) == [f"{INDEX}: damaged, or of other shards; readers do without"]


def test_an_index_holds_samples_of_unlike_members(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    members = [{"json": b"{}"}, {"lr.mkv": b"lr", "json": b"{}"}, {"latents.safetensors": b"l", "json": b"{}"}]
    shards = [write_shard(folder, 0, [Sample(f"k{10**row}", of) for row, of in enumerate(members)])]
    shards.append(write_shard(folder, 1, []))
    write_index(folder, shards)
    index = read_index(folder, shards)
    assert index is not None
    for row, (key, of) in enumerate(zip(shards[0].keys, shards[0].members, strict=True)):
        assert index.find(shards[0].name, row) == (key, of)
    write_index(folder, shards[1:])
    assert read_index(folder, shards[1:]) is not None
