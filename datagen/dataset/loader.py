"""The reader of the trainer: batches in an order that is a function of (seed, epoch) and of nothing else.

An endless stream of samples is laid out as one permutation of the dataset per epoch, one after the other; global
batch k is positions [kG, (k+1)G) of that stream and a rank takes its slice. So every sample comes exactly once
per epoch, global batches are the same for any number of ranks, shards of any size keep all ranks equally busy,
and the position is one number.

Samples are read by offset (`pread` locally, a range request on S3), by a few threads ahead of the trainer. Where they
lie is known from the index, or, in datasets that have none, from the sidecars.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError

from common.errors import UserError
from common.seeding import derive_seed
from common.storage import Folder, StorageConfig, open_folder
from datagen.dataset.cache import cached
from datagen.dataset.dataset import ShardDataset, StoredSample
from datagen.dataset.shard_format import DamagedShard, ShardEntry, Split, read_manifest, sidecar_name
from datagen.dataset.shard_index import read_index

logger = logging.getLogger(__name__)

#: how many samples a damaged one may be followed by, damaged as well, before the reader gives up [ours]
REPLACEMENT_ATTEMPTS = 64
#: threads that read ahead at most [ours]
LARGEST_POOL = 8


@dataclass
class Batch:
    """This rank's part of a global batch.

    Attributes:
        keys: b sample keys.
        tensors: by name, stacked over the batch: `z_hr`, `z_lr` bf16 (b, C, T, h, w) of the member `latents`; for
            the clip members `lr` and `hr`, uint8 (b, F, H, W, 3) under the member's name.
        metadata: each sample's JSON (caption, seed, draws, ...).
    """

    keys: list[str]
    tensors: dict[str, torch.Tensor]
    metadata: list[dict[str, Any]]


class ShardReader:
    """Endless iterator of this rank's batches of a dataset folder.

    Args:
        dataset: local folder or `s3://` prefix that datagen or preference wrote.
        members: which members to read beside the metadata: `latents`, `pair`, `lr`, `hr`.
        seed: of the order.
        split: which samples; those of a dataset without a split are training samples.
        global_batch_size: samples per batch over all ranks; a multiple of `world_size`.
        cache_dir: keep complete shards of a remote dataset here after their first use.
        damaged: what to do with shards that are missing or cut short when the reader opens, and with samples
            whose content has changed: `skip` leaves the former out of the order and puts the following sample of
            the stream in the latter's place (a function of the dataset alone, so the same on all ranks), and logs
            each; `error` raises.
        read_ahead: batches read ahead, by as many threads.

    Raises:
        UserError: no dataset there, an empty one, a batch that does not divide, damage with `damaged="error"`.
    """

    def __init__(
        self,
        dataset: str | os.PathLike[str],
        *,
        members: Sequence[str] = ("latents",),
        seed: int,
        global_batch_size: int,
        split: Split | Literal["all"] = "all",
        rank: int = 0,
        world_size: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        damaged: Literal["skip", "error"] = "skip",
        read_ahead: int = 2,
        storage: StorageConfig | None = None,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % world_size:
            raise UserError(
                f"global batch size {global_batch_size} must be a positive multiple of the {world_size} ranks"
            )
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is outside 0...{world_size - 1}")
        folder = open_folder(dataset, storage)
        self._members = tuple(members)
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._rank = rank
        self._world_size = world_size
        self._skip_damaged = damaged == "skip"
        self._read_ahead = max(1, read_ahead)
        self._consumed = 0

        self.manifest = read_manifest(folder)
        shards = self._intact_shards(folder, self.manifest.shards_of(split))
        if cache_dir is not None:
            folder = cached(folder, cache_dir, {entry.name: entry.sha256 for entry in shards})
        self._dataset = ShardDataset(folder, shards, read_index(folder, self.manifest.shards))
        self._url = folder.url
        if not len(self._dataset):
            what = "sample" if split == "all" else f"{split} sample"
            raise UserError(f"{dataset}: the dataset holds no readable {what}")
        self._fingerprint = self._dataset.fingerprint
        self._permutation = lru_cache(maxsize=2)(self._make_permutation)

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self._dataset)

    def read_ahead(self, batches: int) -> None:
        """Read at least so many batches ahead: those of one training step. Before iteration."""
        self._read_ahead = max(self._read_ahead, batches)

    @property
    def epoch(self) -> float:
        """Epochs consumed so far, by all ranks together."""
        return self._consumed / len(self)

    def __iter__(self) -> Iterator[Batch]:
        ahead: deque[Future[Batch]] = deque()
        following = self._consumed
        with ThreadPoolExecutor(min(self._read_ahead, LARGEST_POOL), thread_name_prefix="shard-reader") as pool:
            try:
                while True:
                    while len(ahead) < self._read_ahead:
                        ahead.append(pool.submit(self._read_batch, following))
                        following += self._global_batch_size
                    batch = ahead.popleft().result()
                    # counted before it is handed over: a state taken while the batch is in use is past it
                    self._consumed += self._global_batch_size
                    yield batch
            finally:
                for pending in ahead:
                    pending.cancel()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, JSON-able, the same on all ranks of any number."""
        return {"dataset": self._fingerprint, "seed": self._seed, "consumed": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position: the next iterator starts there.

        Raises:
            UserError: the position belongs to another dataset or seed, so the order would not be the same.
        """
        if state["dataset"] != self._fingerprint:
            raise UserError(
                f"{self._url}: the saved position belongs to another dataset, or its intact shards have "
                "changed; point --data to the dataset the run began with, or start a new run"
            )
        if state["seed"] != self._seed:
            raise UserError(f"the saved position was made with seed {state['seed']}, this run has {self._seed}")
        self._consumed = int(state["consumed"])

    def _intact_shards(self, folder: Folder, shards: list[ShardEntry]) -> list[ShardEntry]:
        """Shards whose tar and sidecar are there at full size: a cheap check, equal on all ranks."""
        sizes = folder.sizes("shards/")
        intact = []
        for entry in shards:
            size = sizes.get(entry.name)
            if size == entry.bytes and sidecar_name(entry.name) in sizes:
                intact.append(entry)
                continue
            fault = "is missing" if size is None else f"has {size} of {entry.bytes} bytes"
            if size == entry.bytes:
                fault = "has lost its sidecar"
            self._report(f"{folder.url}/{entry.name} {fault}: its {entry.samples} samples are left out")
        return intact

    def _report(self, fault: str) -> None:
        if not self._skip_damaged:
            raise UserError(
                f"{fault}; `python -m datagen.dataset.verify` lists every fault, damaged: skip goes on without"
            )
        logger.warning("%s", fault)

    def _make_permutation(self, epoch: int) -> np.ndarray:
        # raw Philox words are stable across NumPy releases; shuffling methods are not
        words = np.random.Philox(key=derive_seed(self._seed, "epoch", epoch)).random_raw(len(self))
        return np.argsort(words, kind="stable")

    def _sample_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        return int(self._permutation(epoch)[offset])

    def _read_batch(self, start: int) -> Batch:
        share = self._global_batch_size // self._world_size
        first = start + self._rank * share
        samples = [self._read_intact(position) for position in range(first, first + share)]
        names = samples[0][1].keys()
        return Batch(
            keys=[key for key, _, _ in samples],
            tensors={name: _pinned(torch.stack([tensors[name] for _, tensors, _ in samples])) for name in names},
            metadata=[metadata for _, _, metadata in samples],
        )

    def _read_intact(self, position: int) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        """The sample at a position of the stream, or the first intact one after it in its epoch's order."""
        epoch, offset = divmod(position, len(self))
        for attempt in range(min(REPLACEMENT_ATTEMPTS, len(self))):
            index = self._sample_at(epoch * len(self) + (offset + attempt) % len(self))
            try:
                return self._read(self._dataset[index])
            except (DamagedShard, FileNotFoundError, SafetensorError) as error:
                shard, row = self._dataset.place(index)
                name = self._dataset.shards[shard].name
                self._report(f"{error} (sample {row} of {name}): the next one takes its place")
        raise UserError(
            f"{self._url}: {REPLACEMENT_ATTEMPTS} damaged samples in a row; run datagen.dataset.verify on it"
        )

    def _read(self, sample: StoredSample) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        tensors: dict[str, torch.Tensor] = {}
        for member in self._members:
            if f"{member}.safetensors" in sample.spans:
                tensors |= sample.tensors(member)
            elif f"{member}.mkv" in sample.spans:
                tensors[member] = torch.from_numpy(sample.frames(member))
            else:
                raise UserError(
                    f"{self._url}/{sample.shard}: samples have no member {member!r}, only "
                    f"{', '.join(sorted(sample.spans))}; build the dataset again with it"
                )
        return sample.key, tensors, sample.metadata()


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """In page-locked memory where there is a GPU, so that its copy there need not wait."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
