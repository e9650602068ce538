"""The GPU kit at toy size on the CPU: every row is run or says why not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.table import Table
from tests import commands
from tests.trainer.presets import write_preset

SCRIPT = commands.ROOT / "benchmarks" / "gpu" / "run.py"
run = partial(commands.run, SCRIPT, warm_children=True)


@pytest.mark.distributed
def test_checks_at_toy_size(tmp_path: Path) -> None:
    line = ("checks", "--device", "cpu", "--size", "toy", "--minutes", 30, "--output", tmp_path)
    done = run(*line, folder=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    outcomes = {row["row"]: row["outcome"] for row in report["rows"]}
    assert report["failed"] == [] and len(outcomes) == 22, "all rows but the compiled one in bf16"
    unavailable = [name for name, outcome in outcomes.items() if outcome != "passed"]
    assert all(name.startswith("attention ") and outcomes[name] == "not here" for name in unavailable)
    assert outcomes["attention native, fp32"] == "passed"
    written = json.loads((tmp_path / "gpu_checks_cpu.json").read_text())
    assert written["rows"] == report["rows"] and (tmp_path / "gpu_checks_cpu.md").exists()


@pytest.mark.distributed
def test_speed_at_toy_size(tmp_path: Path) -> None:
    done = run("speed", "--device", "cpu", "--size", "toy", "--minutes", 30, "--output", tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    training, inference = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert training["outcome"] == inference["outcome"] == "measured"
    assert training["predicted_gib"] > 0 and training["tokens_per_second"] > 0
    parts = sum(inference[f"{part}_seconds"] for part in ("encode", "transformer", "decode"))
    assert 0 < parts <= inference["seconds"]


@pytest.mark.distributed
def test_train_trains_and_resumes(tmp_path: Path) -> None:
    preset = write_preset(tmp_path)
    line = ["train", "--device", "cpu", "--output", tmp_path / "results", "--config", preset]
    line += ["--data", tmp_path / "clips", "--run", tmp_path / "run", "--minutes", 5, "--more"]
    for stop, finished in (("2", False), (None, True)):
        more = ["--stop-after", stop] if stop else []
        done = run(*line, *more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
        assert row["outcome"] == "measured" and row["finished"] is finished and row["logged_now"] > 0
    steps = [json.loads(entry)["step"] for entry in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == row["step"] > 1


def test_train_without_a_dataset_says_so(tmp_path: Path) -> None:
    line = ("train", "--device", "cpu", "--output", tmp_path, "--data", "nowhere", "--run", "x")
    done = run(*line, folder=tmp_path)
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["outcome"] == "not here" and "no dataset in nowhere" in row["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    done = run("checks")
    assert done.returncode == 2 and "PyTorch sees no GPU here; choose --device cpu" in done.stderr


def test_a_failing_row_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    table = Table(tmp_path, "checks", {"device": "cpu"}, 1.0)
    table.attempt("broken", lambda: {"deviation": 1 / 0})
    table.attempt("wide", lambda: {"deviation": 2.0, "limit": 1.0})
    table.attempt("not a number", lambda: {"deviation": float("nan"), "limit": 1.0})
    table.attempt("fine", lambda: {"deviation": 0.5, "limit": 1.0})
    assert table.failed == ["broken", "wide", "not a number"]
    rows = json.loads((tmp_path / "gpu_checks_cpu.json").read_text())["rows"]
    assert rows[0]["reason"].startswith("ZeroDivisionError") and rows[-1]["outcome"] == "passed"
