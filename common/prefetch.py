"""Iterate in a thread: what comes next is made ready while the last one is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T], ahead: int) -> Iterator[T]:
    """The same items in the same order, up to `ahead` of them read before they are asked for.

    An exception of `items` is raised where its item would have come. Closing the generator ends the thread and closes
    `items`.
    """
    # A Ctrl-C within a queue.Queue can leave it locked, or its reader asleep; SimpleQueue is safe from that.
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room: queue.SimpleQueue[None] = queue.SimpleQueue()
    for _ in range(ahead):
        room.put(None)
    stopped = threading.Event()

    def read() -> None:
        try:
            for item in items:
                room.get()
                if stopped.is_set():
                    break
                ready.put((item, None))
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.put(None)
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        room.put(None)
        thread.join()
