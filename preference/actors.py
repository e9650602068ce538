"""Where pairs are made: in this process, or by Ray actors, one per GPU or per share of the CPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from common.errors import UserError
from preference.config import PreferenceConfig
from preference.pair_maker import Outcome, PairJob, PairMaker

#: positions of clips -> their outcomes, in the same order
MakeAll = Callable[[Sequence[int]], Iterator[Outcome]]


def actor_count(config: PreferenceConfig, device: str) -> int:
    """`preference.actors`, or one per GPU, or one where there is none."""
    return config.actors or (max(1, torch.cuda.device_count()) if device == "cuda" else 1)


@contextmanager
def pair_makers(job: PairJob, address: str | None, *, keep_niqe: bool) -> Iterator[MakeAll]:
    """Makers that share out clips among them.

    Args:
        keep_niqe: as of `PairMaker`.
        address: of a Ray cluster; None: this machine. One actor without a cluster needs no Ray.

    Raises:
        UserError: as of `PairMaker`, or an actor died.
    """
    config, count = job.config, actor_count(job.config, job.device)
    if count == 1 and address is None:
        if config.cpus:
            torch.set_num_threads(config.cpus)
        maker = PairMaker(job, keep_niqe=keep_niqe)
        yield lambda positions: map(maker.make, positions)
        return
    import ray
    from ray.exceptions import RayError
    from ray.util import ActorPool

    from common.ray_start import join_or_start

    cpus = config.cpus or (1 if address else max(1, (os.cpu_count() or 1) // count))
    join_or_start(address, count * cpus)
    share = {"num_gpus": 1} if job.device.startswith("cuda") else {"num_cpus": cpus}
    actor = ray.remote(**share)(_Actor)
    actors = [actor.remote(cpus) for _ in range(count)]

    def make_all(positions: Sequence[int]) -> Iterator[Outcome]:
        try:
            yield from ActorPool(actors).map(lambda one, position: one.make.remote(position), positions)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"an actor failed ({reason}); run the command again, it goes on") from None

    try:
        # The first one fits the NIQE model that the others read.
        faults = [ray.get(actors[0].start.remote(job, keep_niqe))]
        if faults == [None]:
            faults += ray.get([one.start.remote(job, True) for one in actors[1:]])
        for fault in filter(None, faults):
            raise UserError(fault)
        yield make_all
    finally:
        ray.shutdown()


class _Actor:
    """A `PairMaker` in a process of its own."""

    def __init__(self, cpus: int) -> None:
        torch.set_num_threads(cpus)

    def start(self, job: PairJob, keep_niqe: bool) -> str | None:
        """Open model and judges; what the user has to mend, if anything."""
        try:
            self._maker = PairMaker(job, keep_niqe=keep_niqe)
        except UserError as error:
            return str(error)
        return None

    def make(self, position: int) -> Outcome:
        """See `PairMaker.make`."""
        return self._maker.make(position)
