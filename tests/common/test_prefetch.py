"""Reading ahead in a thread changes when items are made, not what comes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from common.prefetch import prefetch
from tests.interrupts import ends_within, interrupted


def test_items_come_in_order_and_are_made_ahead() -> None:
    made, third = [], threading.Event()

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    ahead = prefetch(items(), 2)
    assert next(ahead) == 0
    assert third.wait(10), "nothing was read while the first item was worked on"
    assert max(made) <= 4
    assert list(ahead) == [1, 2, 3, 4, 5]


def test_an_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    ahead = prefetch(items(), 4)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken"):
        next(ahead)


def test_closing_ends_the_thread_and_the_source() -> None:
    closed, threads = threading.Event(), threading.active_count()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    ahead = prefetch(items(), 2)
    assert next(ahead) == 0
    ahead.close()  # type: ignore[attr-defined]
    assert closed.is_set() and threading.active_count() == threads


def test_an_interrupt_at_any_moment_ends_it() -> None:
    """The thread is ended, and nobody waits for it for ever."""
    line, threads = 0, threading.active_count()
    with ends_within(30):
        while True:
            ahead = prefetch(itertools.count(), 1)
            next(ahead)
            if not interrupted(line, lambda ahead=ahead: next(ahead)):  # type: ignore[misc]
                break
            ahead.close()  # type: ignore[attr-defined]
            assert threading.active_count() == threads
            line += 1
    ahead.close()  # type: ignore[attr-defined]
    assert line > 3
