"""Ctrl-C at every moment of a call: a KeyboardInterrupt is raised at a line of Python, as a signal's handler would."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


def interrupted(line: int, call: Callable[[], Any]) -> bool:
    """Whether the call, and all that it calls, has so many lines; it is interrupted at this one, counted from 0."""
    left = line

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event in ("call", "line")
        if left < 0:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@contextmanager
def ends_within(seconds: int) -> Iterator[None]:
    """
    Raises:
        TimeoutError: the block waited for ever.
    """

    def late(*_: object) -> None:
        raise TimeoutError("it never ended")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
