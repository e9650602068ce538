"""The training loop of every stage. It knows steps, files and signals, but no method."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.progress import Counter, progress
from datagen.dataset.loader import Batch, ShardReader
from trainer.checkpoint import (
    Best,
    choose_checkpoint,
    delete_old_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from trainer.config import TrainerConfig
from trainer.divergence import DivergenceWatch
from trainer.engine.process_group import World
from trainer.monitoring.throughput import Throughput
from trainer.monitoring.tracking import Tracker
from trainer.monitoring.validation import Validation
from trainer.output_folder import record_checkpoint
from trainer.preemption import StopSignal
from trainer.stages.crops import crop_latents
from trainer.stages.stage import ScheduleConfig, TrainingStage


@dataclass
class Run:
    """One stage being trained into one output folder."""

    stage: TrainingStage
    reader: ShardReader
    config: TrainerConfig
    schedule: ScheduleConfig
    steps: int
    output: Path
    world: World
    settings: dict[str, Any]
    validation: Validation | None = None
    #: the last validation's numbers
    metrics: dict[str, float] = field(default_factory=dict)
    #: stop after this many steps of this process (saving first), as if preempted; None = run to the end
    stop_after: int | None = None

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"


def train_loop(run: Run) -> bool:
    """Train from the latest checkpoint, or the beginning, to the end. Collective.

    Returns:
        False if a signal ended it early (everything is saved), True if it is finished.

    Raises:
        UserError: the checkpoint does not fit, cannot be written, or too many updates were skipped.
    """
    document = _resume(run)
    start = int(document.get("step", 0))
    tracker = Tracker(run.config.tracking, run.output, run.output.name, run.settings, start) if _first(run) else None
    stop = StopSignal()
    watch = DivergenceWatch(run.config.max_bad_steps, run.config.explosion_factor)
    watch.load_state_dict(document.get("watch", {}))
    best = Best(run.checkpoints, run.stage, run.schedule.keep_best)
    best.load_state_dict(document.get("best", {}))
    best.write()
    throughput = None
    if _first(run):
        throughput = Throughput(
            run.stage,
            global_batch_size=run.schedule.global_batch_size,
            devices=run.world.size,
            peak=run.config.tracking.peak_flops,
        )
    batches = iter(run.reader)
    try:
        with _bar(run, start) as bar:
            for step in range(start, run.steps):
                _set_learning_rates(run, step)
                values = _step(run, step, batches, watch, throughput)
                done = step + 1
                if tracker and (done % run.config.tracking.log_every == 0 or done in (1, run.steps)):
                    tracker.log(step, values)
                if bar:
                    bar.advance(1, **_shown(values))
                improved = False
                if run.validation and (done % run.schedule.validate_every == 0 or done == run.steps):
                    run.metrics = run.validation.look(run.stage, step, tracker)
                    improved = best.improved(done, run.metrics)
                preempted = stop.requested(run.world) or done - start == run.stop_after
                due = done % run.schedule.checkpoint_every == 0 or done == run.steps
                if due or improved or preempted:
                    _save(run, done, watch, best)
                if preempted and done < run.steps:
                    return False
    finally:
        stop.restore()
        if tracker:
            tracker.close()
    return True


def _bar(run: Run, start: int) -> AbstractContextManager[Counter | None]:
    return progress(run.steps, run.stage.name, "step", start=start) if _first(run) else nullcontext()


def _resume(run: Run) -> dict[str, Any]:
    checkpoint = choose_checkpoint(run.checkpoints)
    if checkpoint is None:
        return {}
    document = load_checkpoint(checkpoint, run.stage, run.settings)
    run.reader.load_state_dict(document["reader"])
    if _first(run):
        print(f"going on from {checkpoint}", flush=True)
        for change in changes(document["settings"], run.settings):
            print(f"changed since then: {change}", flush=True)
    run.metrics = document.get("metrics", {})
    return document


def changes(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """What differs between two nested configurations, one line per value."""
    lines = []
    for name in sorted({*before, *now}):
        old, new, where = before.get(name), now.get(name), f"{path}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changes(old, new, f"{where}.")
        elif old != new:
            lines.append(f"{where}: {old} -> {new}")
    return lines


def _save(run: Run, step: int, watch: DivergenceWatch, best: Best) -> None:
    state = {
        "reader": run.reader.state_dict(),
        "world_size": run.world.size,
        "watch": watch.state_dict(),
        "best": best.state_dict(),
        "metrics": run.metrics,
        "settings": run.settings,
    }
    saved = save_checkpoint(run.checkpoints, step, run.stage, state)
    record_checkpoint(run.output, run.stage.name, saved)
    best.write()
    delete_old_checkpoints(run.checkpoints, run.config.keep_checkpoints, best.checkpoint)


def _step(
    run: Run, step: int, batches: Iterator[Batch], watch: DivergenceWatch, throughput: Throughput | None
) -> dict[str, float]:
    began = time.perf_counter()
    local = [next(batches) for _ in range(run.stage.batches_per_step)]
    waited = time.perf_counter() - began
    if run.config.latent_crop is not None:
        identity = (run.config.seed, run.stage.spec.name, step, "latent crop")
        local = [crop_latents(batch, run.config.latent_crop, *identity) for batch in local]
    values = run.stage.train_step(step, local)
    _check(run, step, local, watch.observe(values), watch)
    values["bad_steps"] = float(watch.total)
    values["seconds_per_step"] = time.perf_counter() - began
    values["data_wait_fraction"] = waited / values["seconds_per_step"]
    if throughput:
        values |= throughput.rates(step, local[-1], values["seconds_per_step"])
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


def _check(run: Run, step: int, batches: list[Batch], fault: str | None, watch: DivergenceWatch) -> None:
    if fault is None:
        return
    keys = " ".join(key for batch in batches for key in batch.keys)
    path = run.output / f"bad-steps-rank-{run.world.rank}.txt"
    with path.open("a") as file:
        file.write(f"step {step}: {fault}: {keys}\n")
    if watch.in_a_row >= watch.limit:
        last = latest_checkpoint(run.checkpoints)
        raise UserError(
            f"{watch.in_a_row} bad steps in a row, the last one step {step} ({fault}) with {keys}; "
            f"last good checkpoint: {last or 'none'}; all bad steps: {path}. "
            "Lower the learning rate or look at these samples"
        )
