"""Clips that end the process that works on them: a codec that crashes, a clip for which there is not enough memory.

Ray starts the task again elsewhere, where the clip does it again. So each attempt is noted in Ray's key-value store
before it begins and deleted after it; a clip whose attempts all ended with their process is not tried once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_initialized, _internal_kv_put

#: processes that a clip may end before it is quarantined: one or two may have died of something else [ours]
MAX_ATTEMPTS = 3


@contextmanager
def attempt(job: str, step: str, key: str) -> Iterator[bool]:
    """Whether the block may do `step` of the clip `key`, or has ended its process too often in this job. True without
    Ray."""
    if not _internal_kv_initialized():
        yield True
        return
    name = f"duo-vsr/{job}/{step}/{key}"
    before = int(_internal_kv_get(name) or 0)
    if before >= MAX_ATTEMPTS:
        yield False
        return
    _internal_kv_put(name, str(before + 1))
    try:
        yield True
    finally:
        _internal_kv_del(name)
