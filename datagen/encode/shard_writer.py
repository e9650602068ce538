"""Shards are written by Ray actors, to which rows go straight from where they were encoded: the driver sees counts.

A shard is written by one actor, row by row; an actor holds the shards that it was given and has not committed. What
fails comes back as a `Refusal`: of an exception Ray passes on its own wrapping.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock
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

#: writers of a job: one for each node, as one writes more than a node's GPUs encode; at least two, so that one writes
#: while the other commits; and no more than this, which write more than 64 GPUs encode [ours]
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
            StorageError: a clip's file was out of reach, or the output is.
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
        """Commit shard `index`, to which all its samples were added; raises like `add`."""
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
    """A writer's process has ended, or rows that it waited for are lost. What it had begun must be made again."""


class ShardActor:
    """`ShardWriter` over blocks of Arrow rows, in the order of the calls; `discard` comes before those that wait."""

    def __init__(self, url: str, storage: StorageConfig, plan: str, versions: dict[str, str]) -> None:
        self._url = url
        self._versions = versions
        self._writer = ShardWriter(open_folder(url, storage), plan)
        self._lock = Lock()
        self._discarded = False

    def add(self, index: int, block: pa.Table, first: int, last: int) -> Added | Refusal:
        return self._unless_refused(lambda: self._writer.add(index, samples_of(block, self._versions, first, last)))

    def commit(self, index: int, split: Split | None) -> CommittedShard | Refusal:
        return self._unless_refused(lambda: self._writer.commit(index, split))

    def discard(self) -> None:
        with self._lock:
            self._discarded = True
            self._writer.discard()

    def _unless_refused(self, work: Callable[[], Any]) -> Any:
        with self._lock:
            if self._discarded:
                return Refusal("the job has ended")
            try:
                return work()
            except StorageError as error:
                return Refusal(str(error))
            except OSError as error:
                return Refusal(str(cannot_write(self._url, error)))


class ShardWriters:
    """The actors of a job, for the duration of a block. On a local folder they run on the driver's node, which has it;
    on S3 on all nodes.

    Args:
        plan: its hash.
        versions: of what decides the samples' bytes, for their metadata.
        ahead: bytes of blocks that may wait for their writer.
    """

    def __init__(self, folder: Folder, storage: StorageConfig, plan: str, versions: dict[str, str], ahead: int) -> None:
        self._folder = folder
        local = isinstance(folder, LocalFolder)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"discard": 1})(ShardActor).options(
            scheduling_strategy=here if local else "SPREAD"
        )
        url = os.path.abspath(folder.url) if local else folder.url
        self._start = lambda: actor.remote(url, storage, plan, versions)
        self.count = min(max(2, sum(node["Alive"] for node in ray.nodes())), WRITERS)
        self._actors: dict[int, Any] = {}
        self._begun: dict[int, int] = {}
        self.ahead = ahead

    def add(self, index: int, block: EncodedBlock, first: int, last: int) -> Any:
        """Send samples `first`...`last` - 1 of a block to the writer of shard `index`; to be asked for by `result`."""
        return self._actor(index).add.remote(index, block.reference, first, last)

    def commit(self, index: int, split: Split | None) -> Any:
        """Commit a shard, after all that was sent to it; to be asked for by `result`."""
        return self._actor(index).commit.remote(index, split)

    def is_done(self, handle: Any) -> bool:
        """Whether `result` does not wait."""
        done, _ = ray.wait([handle], timeout=0, fetch_local=False)
        return bool(done)

    def result(self, handle: Any) -> Any:
        """`Added` or `CommittedShard`.

        Raises:
            StorageError: what a writer could not read or write.
            WriterEnded: its process has ended.
        """
        try:
            found = ray.get(handle)
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            raise WriterEnded(str(error).partition("\n")[0]) from error
        if isinstance(found, Refusal):
            raise StorageError(found.line)
        return found

    def __enter__(self) -> ShardWriters:
        return self

    def __exit__(self, *_: object) -> None:
        discarded = [actor.discard.options(concurrency_group="discard").remote() for actor in self._actors.values()]
        if discarded:
            ray.wait(discarded, num_returns=len(discarded), timeout=DISCARD_WITHIN_S)
        for actor in self._actors.values():
            ray.kill(actor)
        self._folder.remove_temporary_files()  # of those whose process has ended

    def _actor(self, index: int) -> Any:
        number = self._begun.setdefault(index, len(self._begun)) % self.count  # in turn, whichever shards are missing
        if number not in self._actors:
            self._actors[number] = self._start()
        return self._actors[number]
