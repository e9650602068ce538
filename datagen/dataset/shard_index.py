"""The index of a dataset: where each member of each sample lies, in one file.

A reader that asks the sidecars sends a request for each shard, and for nearly each sample where a dataset has more
shards than it keeps sidecars of. The index is made of the sidecars when the dataset is complete. They stay what is
true: an index that is missing, damaged, or of other shards than the manifest's is passed over.

`index.safetensors`, for N samples in the order of the shards and the M kinds of members that there are:

    spans    int64 (N, M, 3)    offset, length and CRC-32; -1 where a sample has no such member
    keys     uint8 (N, K)       the samples' keys, padded with zeros
    about    uint8 (B,)         JSON: the members' names, the fingerprint of the shards, SHA-256 of the two arrays
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.fingerprint import fingerprint
from common.storage import Folder
from datagen.dataset.shard_format import ShardEntry, Sidecar, Span, read_sidecar

INDEX = "index.safetensors"
#: sidecars read at once [ours]
READERS = 16


class ShardIndex:
    """Where the samples of some shards lie.

    Args:
        shards: in the order of `keys` and `spans`.
        members: names of the M kinds of members.
        keys: bytes (N,). spans: int64 (N, M, 3).
    """

    def __init__(self, shards: Sequence[ShardEntry], members: list[str], keys: np.ndarray, spans: np.ndarray) -> None:
        self._members, self._keys, self._spans = members, keys, spans
        starts = np.cumsum([0, *(entry.samples for entry in shards)])
        self._first = {entry.name: int(start) for entry, start in zip(shards, starts, strict=False)}

    def find(self, shard: str, row: int) -> tuple[str, dict[str, Span]]:
        """Key and members of a shard's sample."""
        place = self._first[shard] + row
        spans = zip(self._members, self._spans[place].tolist(), strict=True)
        return self._keys[place].decode(), {name: Span(*span) for name, span in spans if span[0] >= 0}


def write_index(folder: Folder, shards: Sequence[ShardEntry]) -> None:
    """Write the index of committed shards, of those that have samples; raises like `read_sidecar`."""
    shards = _in_order(shards)
    members: dict[str, int] = {}
    keys: list[bytes] = []
    parts: list[np.ndarray] = []
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(shards), 4 * READERS):  # not all at once: parsed, sidecars are large
            names = [entry.name for entry in shards[first : first + 4 * READERS]]
            for sidecar in pool.map(lambda name: read_sidecar(folder, name), names):
                keys += [key.encode() for key in sidecar.keys]
                parts.append(_spans(sidecar, members))
    spans = np.full((len(keys), len(members), 3), -1, np.int64)
    start = 0
    for part in parts:
        spans[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    letters = np.array(keys or [b" "], "S")[: len(keys), None].view(np.uint8)
    arrays = {"about": np.frombuffer(_about(shards, list(members), letters, spans), np.uint8)}
    folder.write(INDEX, save(arrays | {"keys": letters, "spans": spans}))


def read_index(folder: Folder, shards: Sequence[ShardEntry]) -> ShardIndex | None:
    """The index of a manifest's shards; None where there is none of them, or a damaged one."""
    shards = _in_order(shards)
    try:
        arrays = load(folder.read(INDEX))
        about, keys, spans = arrays["about"].tobytes(), arrays["keys"], arrays["spans"]
        members = json.loads(about)["members"]
    except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    if about != _about(shards, members, keys, spans):
        return None
    return ShardIndex(shards, members, keys.view(f"S{keys.shape[1]}")[:, 0], spans)


def _in_order(shards: Sequence[ShardEntry]) -> list[ShardEntry]:
    return sorted(shards, key=lambda entry: entry.name)


def _spans(sidecar: Sidecar, members: dict[str, int]) -> np.ndarray:
    """int64 (samples, M, 3) of a shard, with the members known so far in this order; new ones are added to them."""
    for sample in sidecar.members:
        for name in sample:
            members.setdefault(name, len(members))
    spans = np.full((len(sidecar.keys), len(members), 3), -1, np.int64)
    for row, sample in enumerate(sidecar.members):
        for name, span in sample.items():
            spans[row, members[name]] = span
    return spans


def _about(shards: list[ShardEntry], members: Any, keys: np.ndarray, spans: np.ndarray) -> bytes:
    """What has to agree where an index is read, as JSON."""
    digest = hashlib.sha256(keys.data)
    digest.update(spans.data)
    of_shards = fingerprint([[entry.name, entry.samples, entry.sha256] for entry in shards])
    return json.dumps({"members": members, "shards": of_shards, "sha256": digest.hexdigest()}).encode()
