"""Progress of long work: a bar with rate and estimate on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: seconds between plain lines when stderr is not a terminal
PLAIN_INTERVAL_S = 30.0


class Counter:
    """What `progress` hands out; `advance` may be called as often as one likes."""

    def __init__(self, total: int | None, description: str, unit: str, bar: Progress | None, start: int) -> None:
        self.done = start
        self._start, self._total, self._description, self._unit, self._bar = (start, total, description, unit, bar)
        self._task = bar.add_task(description, total=total, completed=start, rate="", fields="") if bar else None
        self._began = self._printed = time.monotonic()

    @property
    def rate(self) -> float:
        """Units per second since the start of this run."""
        return (self.done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def advance(self, count: int = 1, **fields: object) -> None:
        """Count `count` more units as done; `fields` (loss=…, failed=…) are shown behind the bar."""
        before, self.done = self.done, self.done + count
        shown = " ".join(f"{name} {value}" for name, value in fields.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self.rate:.3g} {self._unit}/s", fields=shown)
            return
        now = time.monotonic()
        finished = self._total is not None and before < self._total <= self.done  # a total may be an estimate
        if finished or now - self._printed >= PLAIN_INTERVAL_S:
            self._printed = now
            print(f"{self._description}: {self._position()} {shown}".rstrip(), file=sys.stderr, flush=True)

    def _position(self) -> str:
        if self._total is None:
            return f"{self.done} {self._unit}, {self.rate:.3g} {self._unit}/s"
        left = max(self._total - self.done, 0) / self.rate if self.rate > 0 else float("inf")
        estimate = f"{left:.0f} s left" if left != float("inf") else "no estimate yet"
        return f"{self.done}/{self._total} {self._unit}, {self.rate:.3g} {self._unit}/s, {estimate}"


@contextmanager
def progress(total: int | None, description: str, unit: str, start: int = 0) -> Iterator[Counter]:
    """Show progress on stderr.

    Args:
        total: units in all, or None if unknown.
        start: units done before this run (a resumed job); they do not count in the rate.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Counter(total, description, unit, None, start)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield Counter(total, description, unit, bar, start)
