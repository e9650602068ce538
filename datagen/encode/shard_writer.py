"""Shards are written by Ray actors, to which rows go straight from where they were encoded: the driver sees counts.

A shard is written by one actor, row by row; an actor holds as many shards as it was given and has not committed. What
fails comes back as a `Refusal`: of an exception Ray passes on its own wrapping.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.errors import StorageError
from common.storage import Folder, LocalFolder, StorageConfig, cannot_write, open_folder
from datagen.dataset.shard_format import CommittedShard, ShardFile, Split
from datagen.dataset.shard_statistics import ShardStatistics
from datagen.encode.clip import Fault
from datagen.encode.ray_jobs import UNREACHABLE, EncodedBlock, EncodedSample, samples_of

#: writers of a job at most, one for each node: one writes more than a node's GPUs encode [ours]
WRITERS = 4
#: s that writers have to delete what they have begun, when a job ends before its shards do [ours]
DISCARD_WITHIN_S = 30.0


class Added(NamedTuple):
    """What became of some planned samples: how many there were, lines of quarantine.jsonl, and z_hr taken over."""

    samples: int
    faults: list[dict[str, Any]]
    reused: int


@dataclass
class _Begun:
    file: ShardFile
    statistics: ShardStatistics = field(default_factory=ShardStatistics)
    failed: list[dict[str, Any]] = field(default_factory=list)


class ShardWriter:
    """The shards of a plan that one writer has begun."""

    def __init__(self, folder: Folder, plan: str) -> None:
        self._folder = folder
        self._plan = plan
        self._begun: dict[int, _Begun] = {}

    def add(self, index: int, samples: Iterable[EncodedSample]) -> Added:
        """Append to shard `index` what was made of the next samples of the plan.

        Raises:
            StorageError: a clip's file was out of reach.
            OSError: a full disk.
        """
        if index not in self._begun:
            self._begun[index] = _Begun(ShardFile(self._folder, index))
        shard, added, reused, faults = self._begun[index], 0, 0, []
        for plan, made, taken_over in samples:
            added += 1
            reused += taken_over
            if not isinstance(made, Fault):
                shard.file.add(made)
                shard.statistics.add(made)
                continue
            if made.kind == UNREACHABLE:
                raise StorageError(made.reason)
            line = {"kind": made.kind, "source": plan.source, "start": plan.start, "key": plan.key}
            faults.append(line | {"reason": made.reason})
        shard.failed += faults
        return Added(added, faults, reused)

    def commit(self, index: int, split: Split | None) -> CommittedShard:
        """Commit shard `index`, to which all its samples were added."""
        shard = self._begun[index]
        extra = {"plan": self._plan, "failed": shard.failed, "statistics": shard.statistics.record}
        sidecar = shard.file.commit(extra, split)
        del self._begun[index]
        return sidecar.without_members()

    def discard(self) -> None:
        """Leave nothing behind of what is not committed."""
        for shard in self._begun.values():
            shard.file.discard()
        self._begun.clear()


class Refusal(NamedTuple):
    """Why a writer cannot go on, in one line."""

    line: str


class WriterEnded(Exception):
    """A writer's process has ended. What it had begun must be made again."""


class ShardActor:
    """`ShardWriter` over blocks of Arrow rows."""

    def __init__(self, url: str, storage: StorageConfig, plan: str, versions: dict[str, str]) -> None:
        self._url = url
        self._versions = versions
        self._writer = ShardWriter(open_folder(url, storage), plan)

    def add(self, index: int, block: pa.Table, first: int, last: int) -> Added | Refusal:
        try:
            return self._writer.add(index, samples_of(block, self._versions, first, last))
        except StorageError as error:
            return Refusal(str(error))
        except OSError as error:
            return Refusal(str(cannot_write(self._url, error)))

    def commit(self, index: int, split: Split | None) -> CommittedShard | Refusal:
        try:
            return self._writer.commit(index, split)
        except StorageError as error:
            return Refusal(str(error))
        except OSError as error:
            return Refusal(str(cannot_write(self._url, error)))

    def discard(self) -> None:
        self._writer.discard()


class ShardWriters:
    """The actors of a job, for the duration of a block. On a local folder they run on the driver's node, which has it;
    on S3 on all nodes.

    Args:
        ahead: bytes of blocks that may wait for their writer.
    """

    def __init__(self, folder: Folder, storage: StorageConfig, plan: str, versions: dict[str, str], ahead: int) -> None:
        self._folder = folder
        local = isinstance(folder, LocalFolder)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(ShardActor).options(
            num_cpus=0, max_restarts=0, scheduling_strategy=here if local else "SPREAD"
        )
        url = os.path.abspath(folder.url) if local else folder.url
        self._start = lambda: actor.remote(url, storage, plan, versions)
        self._count = min(WRITERS, sum(node["Alive"] for node in ray.nodes()))
        self._actors: dict[int, Any] = {}
        self.ahead = ahead

    def add(self, index: int, block: EncodedBlock, first: int, last: int) -> Any:
        """Send samples `first`...`last` - 1 of a block to the writer of shard `index`; to be asked for by `result`."""
        return self._actor(index).add.remote(index, block.reference, first, last)

    def commit(self, index: int, split: Split | None) -> Any:
        """Commit a shard, after all that was sent to it; to be asked for by `result`."""
        return self._actor(index).commit.remote(index, split)

    def result(self, handle: Any) -> Any:
        """`Added` or `CommittedShard`.

        Raises:
            StorageError: what a writer could not read or write.
            WriterEnded: its process has ended.
        """
        try:
            found = ray.get(handle)
        except ray.exceptions.RayActorError as error:
            raise WriterEnded from error
        if isinstance(found, Refusal):
            raise StorageError(found.line)
        return found

    def __enter__(self) -> ShardWriters:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ray.exceptions.RayError):
            ray.get([actor.discard.remote() for actor in self._actors.values()], timeout=DISCARD_WITHIN_S)
        for actor in self._actors.values():
            ray.kill(actor)
        if isinstance(self._folder, LocalFolder):
            self._folder.remove_temporary_files()  # of those whose process has ended

    def _actor(self, index: int) -> Any:
        number = index % self._count
        if number not in self._actors:
            self._actors[number] = self._start()
        return self._actors[number]
