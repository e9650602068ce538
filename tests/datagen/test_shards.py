"""The shard format: plain WebDataset tars, whole or absent, byte-identical."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset

from common.errors import UserError
from common.storage import LocalFolder, open_folder
from datagen.dataset.shard_format import DamagedShard, Sample, read_manifest, read_sidecar, shard_name, write_shard
from tests.datagen.conftest import SHARD_SIZES, write_numbered

TAR_SHA256 = "6592c5b99fc87160980af83587f818850db62c0540d610543f7bf5df32e4b8bb"


def test_plain_webdataset_reads_every_sample(dataset: Path) -> None:
    urls = sorted(str(path) for path in (dataset / "shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"key{number:03d}" for number in range(sum(SHARD_SIZES))]
    assert [sample["json"]["number"] for sample in samples] == list(range(sum(SHARD_SIZES)))


def test_members_lie_where_the_sidecar_says(dataset: Path) -> None:
    folder = open_folder(dataset)
    sidecar = read_sidecar(folder, shard_name(2))
    span = sidecar.members[4]["json"]
    content = (dataset / sidecar.name).read_bytes()[span.offset : span.offset + span.length]
    assert json.loads(content)["number"] == SHARD_SIZES[0] + SHARD_SIZES[1] + 4


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_numbered(tmp_path / "a"), write_numbered(tmp_path / "b")
    for path in sorted(first.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_a_renamed_shard_is_refused(dataset: Path) -> None:
    """Its members would be looked for in another tar."""
    renamed = shard_name(7)
    for suffix in (".tar", ".json"):
        (dataset / shard_name(2)).with_suffix(suffix).rename((dataset / renamed).with_suffix(suffix))
    with pytest.raises(DamagedShard, match=r"shard-000007\.json is the sidecar of shards/shard-000002\.tar"):
        read_sidecar(open_folder(dataset), renamed)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def samples() -> Iterator[Sample]:
        yield Sample("a", {"json": b"{}"})
        raise RuntimeError("the machine is on fire")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path, 0, samples())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("keys", [["a.b"], ["a/b"], ["a", "a"]])
def test_keys_that_webdataset_would_confuse_are_refused(tmp_path: Path, keys: list[str]) -> None:
    with pytest.raises(ValueError, match="key"):
        write_shard(tmp_path, 0, [Sample(key, {"json": b"{}"}) for key in keys])


def test_a_folder_without_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json does not exist"):
        read_manifest(LocalFolder(str(tmp_path)))


def test_the_bytes_of_a_tar_are_fixed(tmp_path: Path) -> None:
    """A change here needs a revision of its own in datagen/format_revision.py: begun datasets would mix two kinds."""
    samples = [
        Sample(f"key{index}", {"b.bin": bytes([index]) * 700, "a.bin": b"", "json": b"{}"}) for index in range(3)
    ]
    assert write_shard(tmp_path, 0, samples).sha256 == TAR_SHA256


def test_the_documented_block_reads_every_sample_without_this_project(dataset: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "datagen.md").read_text()
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", page, re.S) if "WebDataset" in text]
    done = subprocess.run([sys.executable, "-c", block], cwd=dataset.parent, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [f"key{i:03d}" for i in range(sum(SHARD_SIZES))]
