"""Ray for a job: started on this machine, or joined where a cluster runs; and how far its steps may run ahead."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback

from common.errors import UserError
from common.ray_start import check_answer, join_or_start
from common.scale import SCALE
from datagen.config import DatagenConfig

#: variants of a clip that travel together; more are made of the clip decoded and encoded again, or what travels would
#: grow with their number [ours]
VARIANTS_PER_ROW = 8

#: how often a task is tried again after its worker died; Ray Data's default is for ever. Enough for a task whose
#: clips all end their worker as often as datagen/encode/attempts.py lets them [ours]
MAX_RETRIES = 24


#: s for which Ray Data looks at its steps as often as it does, ten times a second: short jobs have short tasks [ours]
HURRIED_S = 5.0
#: s between two looks that are added then: a look costs 3 to 8 ms of the driver's CPU however little has happened, and
#: tasks of a long job take seconds [ours]
PAUSE_S = 0.15


class Unhurried(ExecutionCallback):
    """Lets Ray Data look at its steps four times a second once a job has run for `HURRIED_S`."""

    def before_execution_starts(self, executor: Any) -> None:
        self._begun = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        if time.monotonic() - self._begun > HURRIED_S:
            time.sleep(PAUSE_S)


@contextmanager
def ray_when_needed(address: str | None, workers: int | None, config: DatagenConfig) -> Iterator[Callable[[], None]]:
    """What to call before the first Ray job of the block; what it starts ends with the block.

    A job that has nothing to do, or is refused, starts no processes.
    """
    ours = not ray.is_initialized()
    if address and not ours:
        check_answer(address)
        raise UserError(f"--address {address}: this process has joined Ray already; leave --address out to use that")
    try:
        yield partial(start_ray, address, workers, config)
    finally:
        if ours:
            ray.shutdown()


def start_ray(address: str | None, workers: int | None, config: DatagenConfig) -> None:
    """Connect to the cluster at `address`, or start Ray on this machine; `workers` clips are in the making at once
    (default: one per CPU). Where this process has Ray already, that is taken.

    What the VAE actors hold comes on top, or they would keep the tasks waiting while they wait for clips themselves.

    Raises:
        UserError: no cluster at `address`, or one of another version.
    """
    held = (config.encode.actors or 1) * config.encode.cpus
    if not ray.is_initialized():
        join_or_start(address, (workers or os.cpu_count() or 1) + held)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Unhurried]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        cpu=workers + held if workers else None, object_store_memory=memory_ahead(config)
    )
    # it logs the tracebacks of errors that reach us as exceptions anyway
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def dataset_of(rows: list[dict[str, Any]]) -> ray.data.Dataset:
    """Few rows per task: tasks are short enough to balance, and long enough to outweigh their scheduling."""
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    per_task = min(max(len(rows) // (8 * cpus), 1), 8)
    return ray.data.from_items(rows, override_num_blocks=-(-len(rows) // per_task))


def iterate_rows(dataset: ray.data.Dataset) -> Generator[dict[str, Any]]:
    """The rows, in order, as they come. Close it before `ray.shutdown()`, which else waits for its thread for ever."""
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for index in range(batch.num_rows):
                yield batch.slice(index, 1).to_pylist()[0]
    finally:
        dataset._synchronize_progress_bar()  # ends the executor and waits for it, which is all that it does


def iterate_blocks(dataset: ray.data.Dataset) -> Generator[tuple[Any, int, int]]:
    """Reference, rows and bytes of each block, in order, as they come; to be closed like `iterate_rows`."""
    try:
        bundles, _, _ = dataset._execute_to_iterator()  # Ray Data's public iterators fetch the blocks themselves
        for bundle in bundles:
            for entry in bundle.blocks:
                assert entry.metadata.num_rows is not None and entry.metadata.size_bytes is not None
                yield entry.ref, entry.metadata.num_rows, entry.metadata.size_bytes
    finally:
        dataset._synchronize_progress_bar()


def text_array(values: list[str]) -> pa.Array:
    """An Arrow column of texts of any length."""
    return pa.array(values, pa.large_string())


def memory_ahead(config: DatagenConfig) -> int:
    """Bytes that wait between the steps at most, of the whole job: Ray Data starts no task above it.

    Without, clips would pile up before a slower encoder until half of the object stores are full.
    """
    height, width = config.clip.crop
    hr = config.clip.frames * height * width * 3
    row = hr + hr * min(config.variants, VARIANTS_PER_ROW) // SCALE**2
    # stored losslessly, a clip takes no more than its pixels
    row *= 2 if config.store_clips else 1
    resources = ray.cluster_resources()
    # of the object stores Ray Data takes half at most: what else waits beside may not make them spill to the disk
    return min(
        config.encode.clips_ahead * int(resources.get("CPU", 1)) * row, int(resources["object_store_memory"]) // 2
    )
