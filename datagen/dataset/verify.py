"""Check a dataset byte for byte and name each fault.

    python -m datagen.dataset.verify DIR

Exit status 0: every shard is what the manifest says, every sample opens. 1: faults, one line each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from common.command_line import add_config_options, load_sections
from common.errors import UserError, run_command
from common.lossless_clip import decode_bytes
from common.progress import progress
from common.storage import Folder, StorageConfig, open_folder
from datagen.dataset.shard_format import (
    DamagedShard,
    Manifest,
    ShardEntry,
    Sidecar,
    check_member,
    read_manifest,
    read_sidecar,
    sidecar_name,
)
from datagen.dataset.shard_index import INDEX, ShardIndex, read_index


def faults(folder: Folder, threads: int = 4) -> Iterator[str]:
    """Every fault of the dataset, one line each.

    Raises:
        UserError: no manifest to check against.
    """
    manifest = read_manifest(folder)
    yield from _listing_faults(folder, manifest)
    index = read_index(folder, manifest.shards)
    if index is None and INDEX in folder.sizes(INDEX):
        yield f"{INDEX}: damaged, or of other shards; readers do without"
    seen: dict[str, str] = {}
    sides: dict[str, ShardEntry] = {}
    with ThreadPoolExecutor(threads) as pool, progress(len(manifest.shards), "verify", "shards") as bar:
        for entry, (found, keys, sources) in zip(
            manifest.shards, pool.map(lambda entry: _shard_faults(folder, entry, index), manifest.shards), strict=True
        ):
            bar.advance(1)
            yield from found
            for key in keys:
                if seen.setdefault(key, entry.name) != entry.name:
                    yield f"{entry.name}: sample {key} is also in {seen[key]}"
            for source in sources:
                other = sides.setdefault(source, entry)
                if other.split != entry.split:
                    yield f"{entry.name}: source {source} is held out and is trained on, see {other.name}"


def _listing_faults(folder: Folder, manifest: Manifest) -> Iterator[str]:
    listed = {entry.name for entry in manifest.shards}
    for name in sorted(folder.sizes("shards/")):
        if name.endswith(".tar") and name not in listed:
            yield f"{name}: not in the manifest"
    if manifest.samples != sum(entry.samples for entry in manifest.shards):
        yield f"manifest.json: {manifest.samples} samples, but its shards sum to another number"


def _shard_faults(
    folder: Folder, entry: ShardEntry, index: ShardIndex | None
) -> tuple[list[str], list[str], list[str]]:
    """Faults of one shard, the keys in its sidecar, and the sources that its statistics name."""
    try:
        sidecar = read_sidecar(folder, entry.name)
    except FileNotFoundError:
        return [f"{sidecar_name(entry.name)}: missing"], [], []
    except DamagedShard as error:
        return [str(error)], [], []
    sources = list(sidecar.extra.get("statistics", {}).get("counts", {}).get("source", ()))
    try:
        content = folder.read(entry.name)
    except FileNotFoundError:
        return [f"{entry.name}: missing"], sidecar.keys, sources
    found = []
    said = [(of.samples, of.bytes, of.sha256, of.split) for of in (sidecar, entry)]
    if said[0] != said[1]:
        found.append(f"{sidecar_name(entry.name)}: not the shard of the manifest")
    elif index is not None:
        rows = enumerate(zip(sidecar.keys, sidecar.members, strict=True))
        if any(index.find(entry.name, row) != of for row, of in rows):
            found.append(f"{INDEX}: not what {sidecar_name(entry.name)} says")
    if len(content) != entry.bytes:
        found.append(f"{entry.name}: {len(content)} bytes instead of {entry.bytes}")
    elif hashlib.sha256(content).hexdigest() != entry.sha256:
        found.append(f"{entry.name}: sha256 is not the manifest's")
    found += _tar_faults(content, sidecar)
    for key, members in zip(sidecar.keys, sidecar.members, strict=True):
        found += _sample_faults(content, entry.name, key, members)
    return found, sidecar.keys, sources


def _tar_faults(content: bytes, sidecar: Sidecar) -> list[str]:
    """Does a plain tar reader see what the sidecar says?"""
    spans = [
        (span.offset, f"{key}.{member}")
        for key, members in zip(sidecar.keys, sidecar.members, strict=True)
        for member, span in members.items()
    ]
    expected = [name for _, name in sorted(spans)]
    try:
        with tarfile.open(fileobj=BytesIO(content)) as tar:
            names = tar.getnames()
    except tarfile.TarError as error:
        return [f"{sidecar.name}: not a complete tar ({error})"]
    return [] if names == expected else [f"{sidecar.name}: members differ from the sidecar's"]


def _sample_faults(content: bytes, shard: str, key: str, members: dict[str, Any]) -> Iterator[str]:
    for member, span in members.items():
        data = content[span.offset : span.offset + span.length]
        try:
            check_member(data, span, f"{shard}: sample {key}, {member}")
            _open_member(member, data)
        except DamagedShard as error:
            yield str(error)
        except (SafetensorError, UserError, ValueError) as error:
            yield f"{shard}: sample {key}, {member}: does not open ({error})"


def _open_member(member: str, data: bytes) -> None:
    """ValueError or the format's own error where a member is not what its name says."""
    if member.endswith(".safetensors"):
        for name, tensor in load(data).items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite")
    elif member.endswith(".mkv"):
        decode_bytes(data)
    elif member == "json":
        json.loads(data)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m datagen.dataset.verify", description="Check a dataset byte for byte and name each fault."
    )
    parser.add_argument("dataset", help="folder or s3:// prefix")
    add_config_options(parser, required=False)
    arguments = parser.parse_args()
    (storage,) = load_sections(arguments, storage=StorageConfig)
    folder = open_folder(arguments.dataset, storage)
    count = 0
    for fault in faults(folder):
        count += 1
        print(fault)
    manifest = read_manifest(folder)
    if count:
        raise SystemExit(f"{count} faults in {arguments.dataset}")
    print(f"{arguments.dataset}: {manifest.samples} samples in {len(manifest.shards)} shards, no fault")


if __name__ == "__main__":
    run_command(main)
