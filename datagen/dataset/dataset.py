"""Random access to the samples of a dataset folder: the reader below loader, data card, show_samples and preference.

dataset = ShardDataset.open("runs/shards")
sample = dataset[7]
sample.tensors("latents")["z_hr"]      # bf16 (C, T, h, w)
sample.frames("hr")                    # uint8 (F, H, W, 3), where the dataset keeps clips
sample.metadata()["caption"]
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from common.errors import UserError
from common.fingerprint import fingerprint
from common.storage import Folder, StorageConfig, open_folder
from datagen.dataset.shard_format import (
    DamagedShard,
    Manifest,
    ShardEntry,
    Sidecar,
    Span,
    Split,
    read_manifest,
    read_member,
    read_sidecar,
)
from datagen.dataset.shard_index import ShardIndex

if TYPE_CHECKING:
    import torch

#: sidecars kept in memory [ours]
SIDECARS_KEPT = 4096


@dataclass(frozen=True)
class StoredSample:
    """A sample in its shard; a member is read, and its CRC-32 checked, when it is asked for.

    Every method raises DamagedShard or FileNotFoundError where the content is not what was written.
    """

    folder: Folder
    shard: str
    key: str
    spans: dict[str, Span]

    def read(self, member: str) -> bytes:
        """Content of a member, for instance `latents.safetensors`."""
        return read_member(self.folder, self.shard, self.spans[member])

    def metadata(self) -> dict[str, Any]:
        """Its JSON."""
        return dict(json.loads(self.read("json")))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of the member `<name>.safetensors`."""
        # not at the top: the job that writes a dataset reads its clips only, and does without torch
        from safetensors.torch import load

        return load(self.read(f"{name}.safetensors"))

    def frames(self, name: str) -> np.ndarray:
        """Frames of the member `<name>.mkv`, uint8 (F, H, W, 3) RGB."""
        from common.lossless_clip import decode_bytes  # training reads latents: it goes without FFmpeg's libraries

        return decode_bytes(self.read(f"{name}.mkv"))


class ShardDataset:
    """The samples of some shards in the order in which they were written."""

    def __init__(self, folder: Folder, shards: Sequence[ShardEntry], index: ShardIndex | None = None) -> None:
        """
        Args:
            index: where samples lie; without, the shards' sidecars are asked.
        """
        self.folder = folder
        self.shards = list(shards)
        self._index = index
        self._ends = np.cumsum([entry.samples for entry in self.shards], dtype=np.int64)
        self._sidecar = lru_cache(maxsize=SIDECARS_KEPT)(self._load_sidecar)

    @classmethod
    def open(
        cls,
        address: str | os.PathLike[str],
        storage: StorageConfig | None = None,
        *,
        kind: str | None = None,
        split: Split | Literal["all"] = "all",
    ) -> tuple[ShardDataset, Manifest]:
        """Samples of a finished dataset, and its manifest.

        Args:
            kind: `clips` or `pairs`: what it has to hold.
            split: which of its samples; those of a dataset without a split are training samples.

        Raises:
            UserError: no finished dataset there, one of another kind, or an empty one.
        """
        folder = open_folder(address, storage)
        manifest = read_manifest(folder)
        if kind is not None and manifest.kind != kind:
            maker = {"clips": "datagen.build_shards", "pairs": "preference.build"}[kind]
            raise UserError(f"{address} holds {manifest.kind}; give the {kind} that {maker} wrote")
        dataset = cls(folder, manifest.shards_of(split))
        if not len(dataset):
            what = "sample" if split == "all" else f"{split} sample"
            raise UserError(f"{address} holds no {what}; look into its quarantine.jsonl for the reasons")
        return dataset, manifest

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any shard does."""
        return fingerprint([[entry.name, entry.samples, entry.sha256] for entry in self.shards])[:16]

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def __getitem__(self, index: int) -> StoredSample:
        """
        Raises:
            IndexError: outside the dataset.
            DamagedShard, FileNotFoundError: the shard's sidecar is damaged or missing.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard, row = self.place(index)
        if self._index is not None:
            name = self.shards[shard].name
            return StoredSample(self.folder, name, *self._index.find(name, row))
        sidecar = self._sidecar(shard)
        if len(sidecar.keys) != self.shards[shard].samples:
            raise DamagedShard(f"{self.folder.url}/{sidecar.name}: its sidecar is not the one of the manifest")
        return StoredSample(self.folder, sidecar.name, sidecar.keys[row], sidecar.members[row])

    def place(self, index: int) -> tuple[int, int]:
        """(shard, row in the shard) of a sample."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.shards[shard].samples

    def _load_sidecar(self, shard: int) -> Sidecar:
        return read_sidecar(self.folder, self.shards[shard].name)
