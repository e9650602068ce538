"""How several ranks end when one of them fails: an error is reported once, and nobody waits for a rank that is gone.

A rank that fails leaves a note in the store that the ranks met in, reports its error and ends at once, without Python's
tidying up: its closed connections make the others' collectives fail, and launchers kill ranks that are waiting for a
GPU. A rank that finds the note, or finds rank 0 and the store with it gone, was only a bystander and ends silently.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from common.errors import for_people, run_command

#: an error of all ranks is rank 0's to tell; so long another rank waits for it (or for the launcher to end both)
SECONDS_FOR_RANK_0 = 10.0


def run_ranks(main: Callable[[], None]) -> None:
    """`common.errors.run_command` for a command that may be one of several ranks; the same exit statuses."""
    rank = int(os.environ.get("RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        run_command(main)
        return
    try:
        main()
    except KeyboardInterrupt:
        _end(130)
    except Exception as error:
        if (message := for_people(error)) is not None:
            _note(rank, 2)
            if rank == 0:
                print(f"error: {message}", file=sys.stderr)
            elif not _rank_0_tells():
                print(f"error: rank {rank}: {message}", file=sys.stderr)
            _end(2)
        status = _status_of_another()
        if status is None:
            status = 1
            _note(rank, status)
            sys.excepthook(*sys.exc_info())
        _end(status)


def _store() -> dist.Store | None:
    """Where the ranks met; None before they did."""
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None


def _note(rank: int, status: int) -> None:
    store = _store()
    with contextlib.suppress(RuntimeError):  # rank 0 may be gone, and the store with it
        if store is not None:
            store.set(f"failed/{rank}", str(status))
            store.set("failed", str(status))


def _rank_0_tells() -> bool:
    """Whether rank 0 failed as well: then the error is the same, or as good."""
    store = _store()
    if store is None:
        time.sleep(SECONDS_FOR_RANK_0)
        return False  # if it had failed too, the launcher would have ended this rank by now
    deadline = time.monotonic() + SECONDS_FOR_RANK_0
    try:
        while not store.check(["failed/0"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
    except RuntimeError:  # it is gone
        return True
    return True


def _status_of_another() -> int | None:
    """The exit status of a rank that failed before this one, None if this is the first."""
    store = _store()
    try:
        return int(store.get("failed")) if store is not None and store.check(["failed"]) else None
    except RuntimeError:  # rank 0 is gone
        return 1


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
