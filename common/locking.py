"""Locks: an output folder has one writer at a time.

The lock is `filelock`'s advisory lock on a hidden file in the folder. The operating system releases it when its process
ends, however it ends. The file says who holds it: host, process id and, on a cluster, job id.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from common.atomic import write_atomic
from common.errors import UserError

LOCK_NAME = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` for the duration of the block; the folder is made if missing.

    Raises:
        UserError: another process holds it; the message says which. Or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner_file = folder / f"{LOCK_NAME}.json"
    lock = FileLock(folder / LOCK_NAME)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder}: another job is writing here ({_owner(owner_file)}); wait for it or choose another --output"
            ) from None
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        write_atomic(owner_file, json.dumps(owner))
        yield
    finally:
        if lock.is_locked:
            owner_file.unlink(missing_ok=True)
            # Removed while it is still held: filelock checks that the file it locked is the one under this name.
            (folder / LOCK_NAME).unlink(missing_ok=True)
            lock.release()


def _owner(owner_file: Path) -> str:
    try:
        owner = json.loads(owner_file.read_text())
        job = f", job {owner['job']}" if owner["job"] else ""
        return f"host {owner['host']}, process {owner['pid']}{job}"
    except (OSError, ValueError, KeyError):
        return "owner unknown"
