"""The training loop of every stage. It knows steps, files and signals, but no method."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from datagen.reader import Batch, ShardReader
from pipeline.errors import UserError
from pipeline.progress import progress
from trainer.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from trainer.config import ScheduleConfig, TrainerConfig
from trainer.networks import World
from trainer.stage import Stage
from trainer.tracking import Tracker
from trainer.validation import Validation

#: exit status after a signal was answered with a checkpoint: run the same command again (the SLURM launchers do)
EXIT_SAVED_ON_SIGNAL = 85


@dataclass
class Run:
    """One stage being trained into one output folder."""

    stage: Stage
    reader: ShardReader
    config: TrainerConfig
    schedule: ScheduleConfig
    steps: int
    output: Path
    world: World
    settings: dict[str, Any]
    validation: Validation | None = None
    #: stop after this many steps of this process (saving first), as if preempted; None = run to the end
    stop_after: int | None = None

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"


def train(run: Run) -> bool:
    """Train from the latest checkpoint, or the beginning, to the end. Collective.

    Returns:
        False if a signal ended it early (everything is saved), True if it is finished.

    Raises:
        UserError: the checkpoint does not fit, cannot be written, or too many updates were skipped.
    """
    start = _resume(run)
    tracker = Tracker(run.config.tracking, run.output, run.output.name, run.settings, start) if _first(run) else None
    stop = StopSignal()
    skips = _SkipWatch(run)
    batches = iter(run.reader)
    saved = start
    try:
        with progress(run.steps, run.stage.name, "step", start=start) as bar:
            for step in range(start, run.steps):
                _set_learning_rates(run, step)
                values = _step(run, step, batches, skips)
                done = step + 1
                if tracker and (done % run.config.tracking.log_every == 0 or done in (1, run.steps)):
                    tracker.log(step, values)
                bar.advance(1, **_shown(values))
                if run.validation and run.schedule.validate_every and done % run.schedule.validate_every == 0:
                    run.validation.look(run.stage, step, tracker)
                preempted = stop.requested(run.world) or done - start == run.stop_after
                if done % run.schedule.checkpoint_every == 0 or done == run.steps or preempted:
                    _save(run, done)
                    saved = done
                if preempted and done < run.steps:
                    return False
    finally:
        stop.restore()
        if tracker:
            tracker.close()
    if saved < run.steps and start < run.steps:
        _save(run, run.steps)
    return True


def _resume(run: Run) -> int:
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is None:
        return 0
    document = load_checkpoint(checkpoint, run.stage)
    run.reader.load_state_dict(document["reader"])
    if _first(run):
        print(f"going on from {checkpoint}", flush=True)
    return int(document["step"])


def _save(run: Run, step: int) -> None:
    state = {"reader": run.reader.state_dict(), "world_size": run.world.size, "settings": run.settings}
    save_checkpoint(run.checkpoints, step, run.stage, state, run.config.keep_checkpoints)


def _step(run: Run, step: int, batches: Iterator[Batch], skips: _SkipWatch) -> dict[str, float]:
    began = time.perf_counter()
    local = [next(batches) for _ in range(run.stage.batches_per_step)]
    waited = time.perf_counter() - began
    values = run.stage.train_step(step, local)
    skips.check(step, local, values)
    values["seconds_per_step"] = time.perf_counter() - began
    values["data_wait_fraction"] = waited / values["seconds_per_step"]
    values["epoch"] = run.reader.epoch
    values["learning_rate_factor"] = run.stage.exported.schedule_factor
    if torch.cuda.is_available():
        values["memory_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return values


def _set_learning_rates(run: Run, step: int) -> None:
    factor = 1.0
    if run.schedule.learning_rate_schedule == "cosine":
        factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / run.steps))
    for network in run.stage.networks.values():
        network.schedule_factor = factor


def _shown(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in values.items() if name.startswith("loss")}


def _first(run: Run) -> bool:
    return run.world.rank == 0


class _SkipWatch:
    """Counts updates that were skipped for gradients that are not finite; the engines decide that collectively."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._in_a_row = 0
        self._before = self._total()

    def check(self, step: int, batches: list[Batch], values: dict[str, float]) -> None:
        total = self._total()
        self._in_a_row = self._in_a_row + 1 if total > self._before else 0
        self._before = total
        values["skipped_updates"] = float(total)
        if self._in_a_row >= self._run.config.max_skipped_updates:
            keys = ", ".join(key for batch in batches for key in batch.keys[:4])
            last = latest_checkpoint(self._run.checkpoints)
            raise UserError(
                f"{self._in_a_row} updates in a row had gradients that are not finite, the last at step {step} with "
                f"{keys}, …; last good checkpoint: {last or 'none'}. Lower the learning rate or look at these samples"
            )

    def _total(self) -> int:
        return sum(network.skipped for network in self._run.stage.networks.values())


class StopSignal:
    """SIGTERM and SIGUSR1 (SLURM's warning before preemption) ask for a checkpoint; all ranks agree on when."""

    def __init__(self) -> None:
        self._asked = False
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def requested(self, world: World) -> bool:
        """Whether any rank was asked to stop. Collective."""
        flag = torch.tensor([float(self._asked)], device=world.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
