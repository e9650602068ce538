"""Stage II through the trainer's own loop and checkpoints: stopped and resumed against uninterrupted."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import reference_run
from benchmarks.reference_run import Curves, read_curves
from trainer.engine.process_group import World
from trainer.train import train

#: of any logged number of any step, as a share of its mean; on a CPU it is 0
LIMIT = 1e-4
STEPS = 4


def resume_deviation(world: World) -> dict[str, float]:
    """The reference run's Stage II, whose student and teacher are a base model of two steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference_run.make_data(folder / "data")
        _train(folder, "base", "base", 2)
        expected = _train(folder, "dual_stream", "whole", STEPS)
        _train(folder, "dual_stream", "resumed", STEPS, "--stop-after", STEPS // 2)
        found = _train(folder, "dual_stream", "resumed", STEPS)
    deviations = reference_run.compare({"dual_stream": found}, {"dual_stream": expected})
    return {"deviation": max(d.largest for d in deviations), "limit": LIMIT}


def _train(folder: Path, stage: str, output: str, steps: int, *more: Any) -> Curves:
    from trainer.run import parse_arguments, training_job

    line = ["--config", reference_run.PRESET, "--stage", stage, "--output", folder / output, *more]
    line += ["--data", folder / "data" / "clips", "--set", f"trainer.schedules.{stage}.steps={steps}"]
    for part in ("vae", "prompts"):
        line += ["--set", f"model.{part}={folder / 'data' / part}"]
    if stage == "dual_stream":
        line += ["--init", folder / "base" / "model", "--teacher", folder / "base" / "model"]
    train(training_job(parse_arguments([str(word) for word in line])))
    return read_curves(folder / output / "metrics.jsonl")
