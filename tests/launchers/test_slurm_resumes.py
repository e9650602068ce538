"""The commands themselves under SLURM, none replaced: what a signal interrupts goes on to the same result.

Minutes on two cores, so the longest are left out unless they are asked for:

    python -m pytest tests/launchers/test_slurm_resumes.py -m slow
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.commands import python
from tests.datagen.conftest import contents, run_build, write_config, write_videos
from tests.launchers.slurm_cluster import ROOT, SlurmCluster
from tests.trainer.presets import write_preset

pytestmark = pytest.mark.distributed
PYTHON = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def wait_for(condition: object, cluster: SlurmCluster, job: str, seconds: float = 400) -> None:
    """Until `condition()`; the job's log is in the error if it never is."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, cluster.log(job)
        assert cluster.show(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), cluster.log(job)
        time.sleep(0.05)


@pytest.mark.slow
def test_shards_of_two_nodes_go_on_after_the_warning(cluster: SlurmCluster, tmp_path: Path) -> None:
    videos, config = write_videos(tmp_path / "videos"), write_config(tmp_path)
    run_build(config, videos, tmp_path / "whole/dataset")  # a card is headed by its folder
    output = tmp_path / "dataset"
    line = ("--config", config, "--input", videos, "--output", output)
    job = cluster.submit("build_shards", "--nodes=2", "--", *line, **PYTHON | {"PYTHON": python()})
    wait_for(lambda: list(output.glob("shards/*.json")), cluster, job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, "COMPLETED", "FAILED", seconds=400)
    log = cluster.log(job)
    assert cluster.show(job)["Restarts"] == "1" and "requeueing" in log, log
    assert contents(output) == contents(tmp_path / "whole/dataset")
    assert "Killed" not in log
    last = log[log.index("samples: 12/12") :]
    assert not [word for word in ("error", "Error", "CANCELLED", "Terminated", "WARNING") if word in last], last


@pytest.mark.slow
def test_term_to_every_process_of_a_training_step_saves(cluster: SlurmCluster, tmp_path: Path) -> None:
    """As a preemption does it: the rank and wandb's service are both told to end."""
    preset, output = write_preset(tmp_path), tmp_path / "base"
    steps = "trainer.schedules.base={steps: 60, global_batch_size: 4, checkpoint_every: 60, validate_every: 0}"
    line = ["--config", preset, "--stage", "base", "--data", tmp_path / "clips", "--output", output, "--set", steps]
    job = cluster.submit("train", "--", *line, "--set", "trainer.tracking.wandb=offline", **PYTHON)
    wait_for(lambda: (output / "metrics.jsonl").exists() and len(losses(output)) > 2, cluster, job)
    cluster.run("scancel", "--signal=TERM", f"{job}.0")
    cluster.wait(job, "COMPLETED", "FAILED", seconds=400)
    log = cluster.log(job)
    assert cluster.show(job)["Restarts"] == "1" and "requeueing" in log and "saved" in log, log
    assert losses(output) == list(range(60))
    assert (output / "model/model_index.json").is_file() and "Killed" not in log


def losses(output: Path) -> list[int]:
    """Steps of metrics.jsonl that have a loss."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


def test_nodes_are_checked_before_they_work(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = cluster.submit("preflight", "--nodes=2", "--", tmp_path / "run", **PYTHON)
    cluster.wait(job, "COMPLETED", "FAILED")
    log = cluster.log(job)
    assert "all-reduce over 2 ranks" in log and "rank 1: " in log and "error" not in log, log
    assert list((tmp_path / "run").iterdir()) == []


def test_nothing_is_submitted_where_weights_are_missing(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").touch()
    line = ["configs/tiny.yaml", tmp_path / "videos", tmp_path / "run", "--set", "preference.metrics=paper"]
    line += [
        "--set",
        "model.initial_weights=absent/weights",
        "--test",
        tmp_path / "low",
        tmp_path / "videos",
        "--slurm",
    ]
    nowhere = {"PYTHON": python(), "HOME": str(tmp_path), "DUO_VSR_WEIGHTS": ""}
    before = cluster.run("squeue", "--noheader", "--format=%i")
    with pytest.raises(AssertionError) as refused:
        cluster.run(sys.executable, "-m", "launchers.chain", *line, **PYTHON | nowhere)
    said = str(refused.value)
    assert "nothing is started" in said and f"no folder {tmp_path}/low" in said
    assert "no folder model.initial_weights absent/weights" in said and "lpips needs" in said
    assert cluster.run("squeue", "--noheader", "--format=%i") == before and not (tmp_path / "run").exists()
