"""The shards of a plan that are not committed yet: samples are encoded and sent to their writers in order."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from typing import Any, NamedTuple

from common.errors import UserError
from common.progress import progress
from datagen.dataset.shard_format import CommittedShard
from datagen.encode.ray_jobs import EncodedBlock
from datagen.encode.shard_writer import Added, ShardWriters, WriterEnded
from datagen.job_folder import FEW, failures
from datagen.plan import Plan, SamplePlan

#: how often what a writer had begun is made again after its process ended, without a committed shard in between [ours]
MAX_LOST = 3


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
    writers: Callable[[], ShardWriters],
    max_failed: float = 1.0,
) -> list[CommittedShard]:
    """Write the shards that are not committed yet; returns all sidecars, in order.

    Args:
        encode: blocks of planned samples, in order.
        writers: what writes them.
        max_failed: part of a shard's samples, and of the plan's, that may fail.

    Raises:
        StorageError: a clip's file or the output is out of reach.
        UserError: more failed, and the shard is not committed, nor are shards before it if none has a sample; or
            writers end again and again.
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
                lost = lost + 1 if len(sidecars) == before else 1
                if lost == MAX_LOST:
                    raise UserError(
                        f"processes that write shards have ended {lost} times without a shard in between (out of "
                        "memory, or killed); run the same command again to go on"
                    ) from error
                logging.getLogger(__name__).warning("what a writer had begun is made again: %s", error)
    return [sidecars[index] for index in range(len(shards))]


def _write(
    plan: Plan, sidecars: dict[int, CommittedShard], parts: Iterable[_Part], writers: ShardWriters, max_failed: float
) -> None:
    """Send parts to their writers and enter the committed shards in `sidecars`."""
    shards = plan.shards()
    done = sum(len(shards[index]) for index in sidecars)
    failed = sum(failures(sidecar) for sidecar in sidecars.values())
    counts = Counter({"failed": 0, "filtered": 0})
    waiting: deque[tuple[_Part, Any]] = deque()
    commits: deque[tuple[int, Any]] = deque()
    of_shard: list[dict[str, Any]] = []
    making: set[int] = set()
    # complete shards without a sample and one of their faults, while the job has made none: it may be the VAE's
    unproven: deque[tuple[int, dict[str, Any]]] = deque()
    made = sum(sidecar.samples for sidecar in sidecars.values())
    held = 0
    with progress(len(plan.samples), "samples", "clips", start=done) as bar:

        def settle() -> None:
            """Wait for what was sent first; where it completes a shard, commit that once the job makes samples."""
            nonlocal failed, held, made
            part, handle = waiting.popleft()
            added: Added = writers.result(handle)
            held -= part.block.bytes
            counts.update(fault["kind"] for fault in added.faults)
            if added.reused:
                counts["reused"] += added.reused
            bar.advance(added.samples, **counts)
            made += added.samples - len(added.faults)
            of_shard.extend(fault for fault in added.faults if fault["kind"] == "failed")
            if part.completes:
                _check_failed(of_shard, failed, len(shards[part.shard]), len(plan.samples), max_failed)
                if of_shard and not made:
                    unproven.append((part.shard, of_shard[-1]))
                    making.discard(part.shard)
                else:
                    commit(part.shard)
                failed += len(of_shard)
                of_shard.clear()
            while made and unproven:
                commit(unproven.popleft()[0])

        def commit(index: int) -> None:
            commits.append((index, writers.commit(index, plan.split_of(index))))

        def enter() -> None:
            """Wait for the shard that was to be committed first."""
            index, handle = commits.popleft()
            sidecars[index] = writers.result(handle)
            making.discard(index)

        try:
            for part in parts:
                # a writer commits one shard before it begins the next: what a crash costs does not grow with the queue
                while part.shard not in making and len(making) == writers.count:
                    enter() if commits else settle()
                making.add(part.shard)
                waiting.append((part, writers.add(part.shard, part.block, part.first, part.last)))
                held += part.block.bytes
                while waiting and (held > writers.ahead or writers.is_done(waiting[0][1])):
                    settle()
                while commits and writers.is_done(commits[0][1]):
                    enter()
            while waiting:
                settle()
            if unproven:
                raise UserError(f"no sample could be made; the last: {_told(unproven[-1][1])}")
            while commits:
                enter()
            assert len(sidecars) == len(shards), "fewer samples than planned"
        except (UserError, WriterEnded):
            while commits:  # complete shards need not be made again
                with suppress(UserError, WriterEnded):
                    enter()
            raise


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
            assert left, "more samples than planned"
            last = min(block.samples, first + left)
            left -= last - first
            yield _Part(index, block, first, last, left == 0)
            first = last
            if not left:
                index, left = next(shards, (index, 0))


def _check_failed(faults: list[dict[str, Any]], before: int, shard: int, job: int, max_failed: float) -> None:
    """UserError where of `shard` samples, or with those of the shards before of `job`, too many failed."""
    for count, of, what in ((len(faults), shard, "a shard"), (before + len(faults), job, "the job")):
        if faults and (count == job or (count > FEW and count > max_failed * of)):
            raise UserError(
                f"{count} of {of} samples of {what} failed, which is more than max_failed = {max_failed} allows; "
                f"the last: {_told(faults[-1])}"
            )


def _told(fault: dict[str, Any]) -> str:
    return f"{fault['source']}: {fault['reason']}; mend it and run the same command again"
