"""A lock on an `s3://` prefix: an output has one writer at a time there, too.

The lock is an object that is created only if there is none (a conditional PUT) and rewritten as a sign of life. One
whose writer is silent, or was a process of this machine that has ended, is taken over.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone

from common.errors import StorageError, UserError
from common.storage import S3Folder

LOCK_NAME = ".lock.json"
#: s between two signs of life, and s of silence after which a writer is taken for dead [ours]
SIGN_EVERY_S, SILENT_S = 20.0, 120.0


@contextmanager
def only_s3_writer(folder: S3Folder) -> Iterator[None]:
    """Hold the lock of `folder` for the duration of the block.

    Raises:
        UserError: another process holds it; the message says which.
    """
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    content = json.dumps(owner).encode()
    if not folder.create(LOCK_NAME, content) and not _is(folder, owner):
        _check_dead(folder)
        folder.delete(LOCK_NAME)
        if not folder.create(LOCK_NAME, content) and not _is(folder, owner):
            raise UserError(f"{folder.url}: another job began to write here just now; choose another --output")
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(SIGN_EVERY_S):
            with suppress(StorageError):  # the job's own requests say so
                if not _is(folder, owner):
                    return  # taken over while nothing was heard from here
                folder.write(LOCK_NAME, content)

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(StorageError):
            if _is(folder, owner):
                folder.delete(LOCK_NAME)


def _is(folder: S3Folder, owner: dict[str, object]) -> bool:
    """Whether the lock is this owner's, whose PUT was carried out though its answer was lost."""
    try:
        return bool(json.loads(folder.read(LOCK_NAME)) == owner)
    except FileNotFoundError:
        return False


def _check_dead(folder: S3Folder) -> None:
    """UserError if the lock's writer lives."""
    try:
        owner, changed = json.loads(folder.read(LOCK_NAME)), folder.changed(LOCK_NAME)
    except FileNotFoundError:
        return
    silent_s = (datetime.now(timezone.utc) - changed).total_seconds()
    ended = owner["host"] == socket.gethostname() and not os.path.exists(f"/proc/{owner['pid']}")
    if not ended and silent_s < SILENT_S:
        raise UserError(
            f"{folder.url}: another job is writing here (host {owner['host']}, process {owner['pid']}); wait for it or "
            f"choose another --output; if it was killed, try again in {SILENT_S - silent_s:.0f} s"
        )
