"""What the loop around a stage does when numbers go wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from tests.trainer.presets import losses, write_preset
from tests.trainer.ranks import run_on_ranks
from tests.trainer.stages import STAGES, make_run
from trainer.divergence import DivergenceWatch
from trainer.engine.process_group import World
from trainer.loop import Run, changes, train_loop


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset"))


def poison(run: Run, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Put a NaN into the batches of `steps`."""
    train_step = run.stage.train_step

    def poisoned(step: int, batches: Any) -> dict[str, float]:
        if step in steps:
            batches[0].tensors["z_hr"][0, 0, 0, 0, 0] = torch.nan
        return train_step(step, batches)

    monkeypatch.setattr(run.stage, "train_step", poisoned)


@pytest.mark.parametrize("stage", ["base", "dual_stream"])
def test_a_bad_batch_is_skipped_and_named(
    stage: str, preset: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(preset, stage, tmp_path / "run", world)
    poison(run, monkeypatch, {2})
    assert train_loop(run)
    rows = losses(tmp_path / "run")
    assert [row["bad_steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert all(value == value and abs(value) < 1e6 for row in rows[3:] for value in row.values())
    for network in run.stage.networks.values():
        assert all(torch.isfinite(parameter).all() for parameter in network.module.parameters())
    (line,) = (tmp_path / "run" / "bad-steps-rank-0.txt").read_text().splitlines()
    assert line.startswith("step 2: ") and "clip-0" in line


@pytest.mark.distributed
def test_one_ranks_bad_batch_is_skipped_on_all(preset: Path, tmp_path: Path) -> None:
    """In an auxiliary update only the critic stands still, in the student's only the student."""
    arguments = {"preset": str(preset), "output": str(tmp_path / "run")}
    results = run_on_ranks("tests.trainer.scenarios:poisoned_run", 2, **arguments)
    assert all(result["finished"] and all(result["finite"]) for result in results)
    for result in results:
        assert result["skipped"] == [[1, 0], [1, 1], [1, 1]], "critic, student after each step"
    assert [row["bad_steps"] for row in losses(tmp_path / "run")] == [1, 2, 2]
    files = [(tmp_path / "run" / f"bad-steps-rank-{rank}.txt").read_text().splitlines() for rank in range(2)]
    named = [[set(re.findall(r"clip-\d+", line)) for line in lines] for lines in files]
    for lines in files:
        assert [line.split(":")[0] for line in lines] == ["step 0", "step 1"]
    assert all(mine and theirs and mine != theirs for mine, theirs in zip(*named, strict=True))


def test_too_many_bad_steps_end_the_run(
    preset: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(preset, "base", tmp_path / "run", world, max_bad_steps=2)
    poison(run, monkeypatch, {3, 4})
    with pytest.raises(UserError) as error:
        train_loop(run)
    message = str(error.value)
    assert "2 bad steps in a row, the last one step 4" in message
    assert "clip-0" in message and "step-00000002" not in message and "step-00000004" in message


def test_an_exploded_norm_is_a_bad_step() -> None:
    watch = DivergenceWatch(limit=2, factor=10.0)
    for step in range(30):
        assert watch.observe({"loss": 1.0, "gradient_norm_student": 1.0 + 0.1 * (step % 2)}) is None
    assert watch.observe({"gradient_norm_student": 9.0}) is None
    fault = watch.observe({"gradient_norm_student": 50.0})
    assert fault is not None and fault.startswith("gradient_norm_student is 50, usually 1.")
    assert (watch.in_a_row, watch.total) == (1, 1)
    again = DivergenceWatch(limit=2, factor=10.0)
    again.load_state_dict(watch.state_dict())
    assert again.observe({"gradient_norm_student": 50.0}) == fault and again.in_a_row == 2
    assert again.observe({"gradient_norm_student": 1.0}) is None and again.in_a_row == 0


def test_cosine_falls_to_a_tenth(preset: Path, tmp_path: Path, world: World) -> None:
    schedules = {"base": {"steps": 8, "global_batch_size": 4, "learning_rate_schedule": "cosine", "validate_every": 0}}
    run = make_run(preset, "base", tmp_path / "run", world, schedules=schedules)
    assert train_loop(run)
    factors = [row["learning_rate_factor"] for row in losses(tmp_path / "run")]
    assert factors[0] == 1.0 and factors == sorted(factors, reverse=True)
    assert factors[4] == pytest.approx(0.55)
    peak = run.config.base.optimizer.learning_rate
    assert run.stage.exported.learning_rates == [pytest.approx(peak * factors[-1])]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_shows_what_it_says(stage: str, preset: Path, tmp_path: Path, world: World) -> None:
    built = make_run(preset, stage, tmp_path / "run", world)
    assert tuple(built.stage.previews(next(iter(built.reader)))) == built.stage.preview_names


def test_changes_are_listed_by_name() -> None:
    before, now = {"a": {"b": 1, "c": [2]}, "d": 3}, {"a": {"b": 4, "c": [2]}, "e": 5}
    assert changes(before, now) == ["a.b: 1 -> 4", "d: 3 -> None", "e: None -> 5"]
