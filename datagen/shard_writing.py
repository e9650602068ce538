"""The shards of a plan that are not committed yet: samples are encoded and sent to their writers in order."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from typing import Any, NamedTuple, Protocol

from common.errors import UserError
from common.progress import progress
from datagen.dataset.shard_format import CommittedShard, Split
from datagen.encode.ray_jobs import EncodedBlock
from datagen.encode.shard_writer import Added, WriterEnded
from datagen.job_folder import FEW, failures
from datagen.plan import Plan, SamplePlan

#: how often what a writer had begun is made again after its process ended, without a committed shard in between [ours]
MAX_LOST = 3


class Writers(Protocol):
    """`ShardWriters`, as far as this file knows them: calls give handles, in whose order `result` is asked for."""

    ahead: int

    def add(self, index: int, block: EncodedBlock, first: int, last: int) -> Any: ...

    def commit(self, index: int, split: Split | None) -> Any: ...

    def result(self, handle: Any) -> Any: ...


class _Part(NamedTuple):
    """What a block holds of a shard: samples `first`...`last` - 1; whether the shard is complete with them."""

    shard: int
    block: EncodedBlock
    first: int
    last: int
    completes: bool


def write_shards(
    plan: Plan,
    committed: dict[int, CommittedShard],
    encode: Callable[[list[SamplePlan]], Generator[EncodedBlock]],
    writers: Callable[[], AbstractContextManager[Writers]],
    max_failed: float = 1.0,
) -> list[CommittedShard]:
    """Write the shards that are not committed yet; returns all sidecars, in order.

    Args:
        encode: blocks of planned samples, in order.
        writers: what writes them.
        max_failed: part of a shard's samples, and of the plan's, that may fail.

    Raises:
        StorageError: a clip's file or the output is out of reach.
        UserError: more failed; the shard is not committed.
    """
    shards, sidecars = plan.shards(), dict(committed)
    lost = 0
    while missing := [index for index in range(len(shards)) if index not in sidecars]:
        before = len(sidecars)
        samples = [sample for index in missing for sample in shards[index]]
        with closing(encode(samples)) as blocks, writers() as at_work:
            try:
                _write(plan, sidecars, _parts(blocks, [(i, len(shards[i])) for i in missing]), at_work, max_failed)
            except WriterEnded as error:
                lost = lost + 1 if len(sidecars) == before else 0
                if lost == MAX_LOST:
                    raise
                logging.getLogger(__name__).warning("a writer's process has ended: %s", error.__cause__)
    return [sidecars[index] for index in range(len(shards))]


def _write(
    plan: Plan, sidecars: dict[int, CommittedShard], parts: Iterable[_Part], writers: Writers, max_failed: float
) -> None:
    """Send parts to their writers and enter the committed shards in `sidecars`."""
    shards = plan.shards()
    done = sum(len(shards[index]) for index in sidecars)
    failed = sum(failures(sidecar) for sidecar in sidecars.values())
    counts = Counter({"failed": 0, "filtered": 0})
    waiting: deque[tuple[_Part, Any]] = deque()
    commits: deque[tuple[int, Any]] = deque()
    of_shard: dict[int, list[dict[str, Any]]] = {}
    with progress(len(plan.samples), "samples", "clips", start=done) as bar:

        def settle() -> None:
            """Wait for what was sent first; where it completes a shard, commit that."""
            nonlocal failed
            part, handle = waiting.popleft()
            added: Added = writers.result(handle)
            counts.update(fault["kind"] for fault in added.faults)
            if added.reused:
                counts["reused"] += added.reused
            bar.advance(added.samples, **counts)
            faults = of_shard.setdefault(part.shard, [])
            faults += [fault for fault in added.faults if fault["kind"] == "failed"]
            if part.completes:
                _check_failed(faults, failed, len(shards[part.shard]), len(plan.samples), max_failed)
                failed += len(of_shard.pop(part.shard))
                commits.append((part.shard, writers.commit(part.shard, plan.split_of(part.shard))))
                while len(commits) > 1:
                    enter()

        def enter() -> None:
            index, handle = commits.popleft()
            sidecars[index] = writers.result(handle)

        held = 0
        for part in parts:
            waiting.append((part, writers.add(part.shard, part.block, part.first, part.last)))
            held += part.block.bytes
            while held > writers.ahead:
                held -= waiting[0][0].block.bytes
                settle()
        while waiting:
            settle()
        while commits:
            enter()


def _parts(blocks: Iterable[EncodedBlock], shards: Iterable[tuple[int, int]]) -> Iterator[_Part]:
    """`blocks` cut where shards end.

    Args:
        shards: index and number of samples of each, in order.
    """
    shards = iter(shards)
    index, left = next(shards)
    for block in blocks:
        first = 0
        while first < block.samples:
            last = min(block.samples, first + left)
            left -= last - first
            yield _Part(index, block, first, last, left == 0)
            first = last
            if not left:
                index, left = next(shards, (-1, 0))


def _check_failed(faults: list[dict[str, Any]], before: int, shard: int, job: int, max_failed: float) -> None:
    """UserError where of `shard` samples, or with those of the shards before of `job`, too many failed."""
    for count, of, what in ((len(faults), shard, "a shard"), (before + len(faults), job, "the job")):
        if faults and (count == job or (count > FEW and count > max_failed * of)):
            raise UserError(
                f"{count} of {of} samples of {what} failed, which is more than max_failed = {max_failed} allows; "
                f"the last: {faults[-1]['source']}: {faults[-1]['reason']}; mend it and run the same command again"
            )
