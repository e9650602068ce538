"""Run a list of commands once: each step has a log and a stamp, so an interrupted list goes on where it was.

The minutes that are left follow from the seconds that each step is expected to take, and from how much longer or
shorter those took that are done.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

#: lines of the log shown when a step fails
TAIL_LINES = 25


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    #: what is printed while it runs
    description: str
    command: tuple[str, ...]
    #: as measured elsewhere; only their ratios count once a step is done. 0: not known
    expected_seconds: float = 0


class StepFailed(Exception):
    """The message names the command and shows the end of its log."""


class StepRunner:
    """Runs steps in order and remembers how long each took."""

    def __init__(self, folder: Path, steps: list[Step]) -> None:
        """
        Args:
            folder: where logs and stamps go.
            steps: all that will be run, in order.
        """
        self._folder = folder
        self._steps = steps
        self._began = time.monotonic()
        #: seconds by step name, those of earlier runs included
        self.seconds: dict[str, float] = {}
        #: command lines by step name
        self.commands: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, step: Step) -> None:
        """Run the step unless this very command has already finished here.

        Raises:
            StepFailed: it ended with another status than 0.
        """
        line = shlex.join(step.command)
        self.commands[step.name] = line
        stamp, log = self._folder / f"{step.name}.done", self._folder / f"{step.name}.log"
        identity = hashlib.sha256(line.encode()).hexdigest()
        seconds = _finished(stamp, identity)
        if seconds is None:
            self._say(step, f"… ({self._left(step)})" if step.expected_seconds else "…")
            began = time.monotonic()
            with log.open("wb") as file:
                status = _run(step.command, file)
            if status != 0:
                raise StepFailed(_failure(step, line, log, status))
            seconds = time.monotonic() - began
            stamp.write_text(json.dumps({"command": identity, "seconds": round(seconds, 2)}))
            self._say(step, f"{seconds:.0f} s")
        else:
            self._say(step, "done before")
        self.seconds[step.name] = seconds

    def _say(self, step: Step, state: str) -> None:
        elapsed = time.monotonic() - self._began
        clock = f"{int(elapsed // 60):02d}:{int(elapsed % 60):02d}"
        number, total = self._steps.index(step) + 1, len(self._steps)
        print(f"[{clock}] step {number} of {total}: {step.description} {state}", flush=True)

    def _left(self, step: Step) -> str:
        """How long this step and those after it will take."""
        first = self._steps.index(step)
        done, left = (sum(s.expected_seconds for s in part) for part in (self._steps[:first], self._steps[first:]))
        pace = sum(self.seconds.values()) / done if done else 1.0
        return f"about {max(round(left * pace / 60), 1)} min left"


@contextmanager
def one_line_endings() -> Iterator[None]:
    """For a command that runs steps: status 2 and a line where one failed, 130 and a line after Ctrl-C."""
    try:
        yield
    except StepFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


def python(module: str, *arguments: object) -> tuple[str, ...]:
    """`python -m module …` with this interpreter."""
    return (sys.executable, "-m", module, *map(str, arguments))


def _run(command: tuple[str, ...], log: BinaryIO) -> int:
    """Exit status. SIGTERM is passed on, so that a trainer saves, and ends this process when the command has ended."""
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as child:
        asked: list[int] = []

        def stop(number: int, _: FrameType | None) -> None:
            asked.append(number)
            child.send_signal(number)

        previous = signal.signal(signal.SIGTERM, stop)
        try:
            status = child.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)
    if asked:
        raise SystemExit(128 + signal.SIGTERM)
    return status


def _finished(stamp: Path, identity: str) -> float | None:
    try:
        record = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return None
    return float(record["seconds"]) if record.get("command") == identity else None


def _failure(step: Step, line: str, log: Path, status: int) -> str:
    tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    shown = "\n".join(f"    {row}" for row in tail)
    return f"{step.name} failed with status {status}:\n  {line}\n{shown}\n  full log: {log}"
