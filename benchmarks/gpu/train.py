"""The part `train`: a preset's stage from a carried dataset, for some minutes, resumed where it was.

The real command runs in a process of its own and is sent TERM when the time is over, so it saves and the next call goes
on. `runs/` is where its checkpoints stay; carry them back with the results.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import NotHere, Table
from trainer.preemption import EXIT_SAVED_ON_SIGNAL

ROOT = Path(__file__).resolve().parents[2]
#: kept for loading and saving
RESERVED_SECONDS = 60
#: how long the last step and its checkpoint may take after TERM
GRACE_SECONDS = 120


@dataclass(frozen=True)
class TrainingPart:
    """What trains: the arguments of `trainer/run.py`."""

    config: Path
    stage: str
    data: Path
    output: Path
    #: further arguments, as typed
    more: tuple[str, ...] = ()

    def command(self, device: str) -> list[str]:
        line = [sys.executable, str(ROOT / "trainer" / "run.py"), "--config", str(self.config), "--stage", self.stage]
        line += ["--data", str(self.data), "--output", str(self.output), "--set", "trainer.tracking.wandb=off"]
        return [*line, *self.more, *(["--set", "trainer.attention=native"] if device == "cpu" else [])]


def run(table: Table, part: TrainingPart, device: str, minutes: float) -> None:
    """One row: how far the stage came."""
    table.attempt(f"training: {part.stage}", lambda: train(part, device, minutes))


def train(part: TrainingPart, device: str, minutes: float) -> dict[str, Any]:
    """Train until the end or until the time is over.

    Raises:
        NotHere: no dataset was carried.
        RuntimeError: the command failed; with its last line.
    """
    if not part.data.is_dir():
        raise NotHere(f"no dataset in {part.data}: carry one there")
    began, before = time.monotonic(), len(_log(part.output))
    with subprocess.Popen(part.command(device), stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=max(1.0, 60 * minutes - RESERVED_SECONDS))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=GRACE_SECONDS)
    if process.returncode not in (0, EXIT_SAVED_ON_SIGNAL):
        raise RuntimeError((errors.strip().splitlines() or ["no message"])[-1])
    log = _log(part.output)
    last = log[-1] if log else {}
    return {
        "finished": process.returncode == 0,
        "step": last.get("step"),
        "loss": last.get("loss"),
        "samples_per_second": last.get("samples_per_second"),
        "logged_now": len(log) - before,
        "seconds": time.monotonic() - began,
    }


def _log(output: Path) -> list[dict[str, Any]]:
    """Lines of the run's metrics.jsonl that are of training steps."""
    file = output / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [line for line in lines if "samples_per_second" in line]
