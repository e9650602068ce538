"""Run a list of commands once: each step has a log and a stamp, so an interrupted list goes on where it was."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

#: lines of the log shown when a step fails
TAIL_LINES = 25


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    #: what is printed while it runs
    description: str
    command: tuple[str, ...]


class StepFailed(Exception):
    """The message names the command and shows the end of its log."""


class StepRunner:
    """Runs steps in order and remembers how long each took."""

    def __init__(self, folder: Path, total: int) -> None:
        """
        Args:
            folder: where logs and stamps go.
            total: number of steps, for the counter on the screen.
        """
        self._folder = folder
        self._total = total
        self._number = 0
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
        self._number += 1
        line = " ".join(_quoted(step.command))
        self.commands[step.name] = line
        stamp, log = self._folder / f"{step.name}.done", self._folder / f"{step.name}.log"
        identity = hashlib.sha256(line.encode()).hexdigest()
        seconds = _finished(stamp, identity)
        if seconds is None:
            self._say(step, "…")
            began = time.monotonic()
            with log.open("wb") as file:
                status = subprocess.run(step.command, stdout=file, stderr=subprocess.STDOUT).returncode
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
        print(f"[{clock}] step {self._number} of {self._total}: {step.description} {state}", flush=True)


def python(module: str, *arguments: object) -> tuple[str, ...]:
    """`python -m module …` with this interpreter."""
    return (sys.executable, "-m", module, *map(str, arguments))


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


def _quoted(command: tuple[str, ...]) -> list[str]:
    return [f"'{word}'" if " " in word or "*" in word else word for word in command]
