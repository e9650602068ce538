"""An output folder nobody can spoil: damaged, deleted, shared, full or signalled, no work is lost in silence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.locking import only_writer
from tests.small_disk import mounted
from tests.trainer.presets import (
    losses,
    run_command,
    signal_after,
    start_command,
    two_ranks_without_a_launcher,
    write_preset,
)
from tests.trainer.stages import make_run
from trainer.checkpoint import list_checkpoints
from trainer.config import TrackingConfig
from trainer.engine.process_group import World
from trainer.loop import train_loop
from trainer.monitoring.tracking import Tracker
from trainer.output_folder import owned
from trainer.preemption import EXIT_SAVED_ON_SIGNAL


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset"))


@pytest.fixture(scope="module")
def trained(preset: Path, world: World) -> Path:
    """Five steps of the base, checkpoints after 2, 4 and 5."""
    output = preset.parent / "trained"
    with owned(output):
        assert train_loop(make_run(preset, "base", output, world))
    return output


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt, as it was after 4 steps."""
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    shutil.rmtree(output / "checkpoints" / "step-00000005")
    (output / "run.json").write_text('{"stage": "base", "last_checkpoint": "step-00000004"}\n')
    return output


def go_on(preset: Path, output: Path, world: World, **arguments: Any) -> None:
    with owned(output, **arguments):
        assert train_loop(make_run(preset, "base", output, world))


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "file"),
    [
        *((how, "student/rank-00000.safetensors") for how in ("cut short", "one bit", "gone")),
        *((how, "state.json") for how in ("cut short", "gone")),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(
    how: str, file: str, preset: Path, trained: Path, output: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = output / "checkpoints" / "step-00000004" / file
    spoil(path, how)
    go_on(preset, output, world)
    warning = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING"))
    assert str(path.parent if file == "state.json" else path) in warning and "step-00000004.damaged" in warning
    assert losses(output) == losses(trained), "from step 2 on it is the same run"
    assert "step-00000004.damaged" in names(output)


def test_without_an_intact_checkpoint_nothing_is_begun_again(preset: Path, output: Path, world: World) -> None:
    before = (output / "metrics.jsonl").read_text()
    for checkpoint in list_checkpoints(output / "checkpoints"):
        spoil(checkpoint / "student/rank-00000.safetensors", "cut short")
    with pytest.raises(UserError, match=r"no intact checkpoint is left.*--restart"):
        go_on(preset, output, world)
    assert (output / "metrics.jsonl").read_text() == before


def test_lost_checkpoints_are_refused_and_restart_keeps_the_old_log(
    preset: Path, trained: Path, output: Path, world: World
) -> None:
    before = (output / "metrics.jsonl").read_text()
    shutil.rmtree(output / "checkpoints")
    with pytest.raises(UserError, match="checkpoints are gone, step-00000004 was the last one"):
        go_on(preset, output, world)
    assert (output / "metrics.jsonl").read_text() == before
    go_on(preset, output, world, restart=True)
    assert (output / "before-restart-1" / "metrics.jsonl").read_text() == before
    assert losses(output) == losses(trained)


def test_a_requeued_job_with_restart_goes_on(
    preset: Path, output: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    go_on(preset, output, world, restart=True)
    assert not list(output.glob("before-restart-*"))


def test_killed_before_its_first_checkpoint_it_begins_again_without_being_asked(
    preset: Path, tmp_path: Path, world: World
) -> None:
    tmp_path.joinpath("metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    go_on(preset, tmp_path, world)
    assert len(losses(tmp_path)) == 5


def test_leftovers_go_and_copies_are_no_checkpoints(preset: Path, trained: Path, output: Path, world: World) -> None:
    checkpoints = output / "checkpoints"
    shutil.copytree(checkpoints / "step-00000002", checkpoints / ".step-00000003.partial")
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000099.bak")
    go_on(preset, output, world)
    assert losses(output) == losses(trained)
    assert ".step-00000003.partial" not in names(output) and "step-00000099.bak" in names(output)


def test_another_frozen_network_is_refused_by_name(preset: Path, tmp_path: Path, world: World) -> None:
    stopped = make_run(preset, "dual_stream", tmp_path, world, stop_after=2)
    assert not train_loop(stopped)
    other = make_run(preset, "dual_stream", tmp_path, world)
    other.stage.real_score.constants ^= 1
    other.settings["parents"] = {"teacher": "runs/other"}
    with pytest.raises(UserError, match=r"beside other weights of real_score: --teacher was .*, now it is runs/other"):
        train_loop(other)


def test_the_command_says_so_in_one_line(preset: Path, tmp_path: Path) -> None:
    """The real command on spoilt folders: a rank file cut short, leftovers, checkpoints deleted, another teacher."""

    def train(stage: str, output: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        line = ["--config", preset, "--data", preset.parent / "clips", "--stage", stage, "--output", tmp_path / output]
        done = run_command(*line, *arguments)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    assert train("base", "cut", "--stop-after", 4).returncode == EXIT_SAVED_ON_SIGNAL
    shutil.copytree(tmp_path / "cut", tmp_path / "lost")
    file = tmp_path / "cut" / "checkpoints" / "step-00000004" / "student" / "rank-00000.safetensors"
    spoil(file, "cut short")
    checkpoints = file.parents[2]
    shutil.copytree(checkpoints / "step-00000002", checkpoints / ".step-00000003.partial")
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000099.bak")
    done = train("base", "cut")
    assert not (checkpoints / ".step-00000003.partial").exists()
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert done.returncode == 0 and str(file) in warning and len(losses(tmp_path / "cut")) == 5

    shutil.rmtree(tmp_path / "lost" / "checkpoints")
    done = train("base", "lost")
    assert done.returncode == 2 and "checkpoints are gone, step-00000004 was the last one" in done.stderr
    assert train("base", "lost", "--restart", "--set", "trainer.seed=4").returncode == 0

    models = {name: tmp_path / name / "model" for name in ("cut", "lost")}
    begun = train("dual_stream", "two", "--init", models["cut"], "--teacher", models["cut"], "--stop-after", 2)
    assert begun.returncode == EXIT_SAVED_ON_SIGNAL, begun.stderr
    done = train("dual_stream", "two", "--init", models["cut"], "--teacher", models["lost"])
    assert done.returncode == 2 and "beside other weights of real_score" in done.stderr


#: what a network file system does to one node, as a module that Python imports at its start
STALE_LISTING = """
import os, sys

complete = os.scandir

def stale(path="."):
    entries = complete(path)
    if os.path.basename(path) != "checkpoints":
        return entries
    found = [entry for entry in entries if entry.name != "step-00000004"]
    print("step-00000004 is not listed", file=sys.stderr)
    return Listing(found)

class Listing(list):
    __enter__ = lambda self: iter(self)
    __exit__ = close = lambda self, *_: None

os.scandir = stale
"""


@pytest.mark.distributed
def test_rank_0_decides_which_checkpoint_is_read(preset: Path, output: Path, tmp_path: Path) -> None:
    """The real command on two ranks; rank 1 does not see the newest checkpoint yet, as on a network file system."""
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text(STALE_LISTING)
    line = ["--config", preset, "--stage", "base", "--data", preset.parent / "clips", "--output", output]
    (status_0, errors_0), (status_1, errors_1) = two_ranks_without_a_launcher(
        *line, rank_1={"PYTHONPATH": str(late)}, warm=False
    )
    assert (status_0, status_1) == (0, 0), errors_0 + errors_1
    assert "is not listed" in errors_1 and "is not listed" not in errors_0
    assert [row["step"] for row in losses(output)] == [0, 1, 2, 3, 4], "one step more, not three"


def command(preset: Path, output: Path, **schedule: Any) -> list[object]:
    numbers = {"steps": 400, "global_batch_size": 4, "checkpoint_every": 10, "validate_every": 0} | schedule
    steps = f"trainer.schedules.base={json.dumps(numbers)}"
    data = preset.parent / "clips"
    return ["--config", preset, "--stage", "base", "--data", data, "--output", output, "--set", steps]


@pytest.mark.distributed
def test_a_second_process_is_refused_and_a_killed_one_leaves_the_folder_free(preset: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = start_command(*command(preset, output, steps=100_000))
    try:
        while not (output / "metrics.jsonl").exists() and first.poll() is None:
            pass
        second = run_command(*command(preset, output))
        assert second.returncode == 2
        (line,) = [line for line in second.stderr.splitlines() if line.startswith("error:")]
        assert f"host {socket.gethostname()}, process {first.pid}" in line and str(output) in line
        assert first.poll() is None, "the first goes on"
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate(timeout=60)
    third = run_command(*command(preset, output, steps=12))
    assert third.returncode == 0, third.stderr


def test_the_lock_names_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with only_writer(tmp_path), pytest.raises(UserError, match="job 4711"), only_writer(tmp_path):
        pass


@pytest.mark.distributed
def test_term_to_the_process_group_saves_although_wandb_dies_with_it(preset: Path, tmp_path: Path) -> None:
    """As SLURM does it: the signal reaches wandb's service, too."""
    output = tmp_path / "run"
    line = [*command(preset, output, steps=100_000), "--set", "trainer.tracking.wandb=offline"]
    process = start_command(*line)
    signal_after(process, output / "metrics.jsonl", 15, signal.SIGCONT)  # nothing but the wait
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_SAVED_ON_SIGNAL, errors
    done = len(losses(output))
    assert names(output)[-1] == f"step-{done:08d}", "saved where it stood"
    again = run_command(*line, "--stop-after", 3)
    assert again.returncode == EXIT_SAVED_ON_SIGNAL, again.stderr
    runs = list((output / "wandb").glob("offline-run-*"))
    identities = {path.name.split("-", 3)[-1] for path in runs}
    assert len(runs) == len(identities) == 2, "runs of their own"
    assert len({identity.split("-")[0] for identity in identities}) == 1, "of one group"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    with mounted(tmp_path / "disk", "16m") as disk:
        yield disk


def fill(ballast: Path) -> None:
    with pytest.raises(OSError, match="No space left"), ballast.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.distributed
def test_a_full_disk_costs_log_lines_and_nothing_else(preset: Path, disk: Path) -> None:
    output, ballast = disk / "run", disk / "ballast"
    log = output / "metrics.jsonl"
    line = command(preset, output, steps=100_000, checkpoint_every=100_000)
    process = start_command(*line)
    signal_after(process, log, 3, signal.SIGCONT)  # nothing but the wait
    fill(ballast)
    written = 0
    while written != (written := log.stat().st_size) and process.poll() is None:
        time.sleep(0.5)  # until the last page of the log is full
    ballast.unlink()
    signal_after(process, log, len(log.read_text().splitlines()) + 3, signal.SIGTERM)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_SAVED_ON_SIGNAL, errors
    (warning,) = [line for line in printed.splitlines() if line.startswith(f"WARNING: cannot write {log}")]
    assert "No space left on device; training goes on" in warning
    steps = [row["step"] for row in losses(output)]
    (done,) = (int(name.removeprefix("step-")) for name in names(output))
    lost = int(re.findall(r"lacks (\d+) lines", printed)[0])
    assert steps == sorted(set(steps)) and lost == done - len(steps) > 0, "no half line, and none in silence"


@pytest.mark.distributed
def test_a_full_disk_under_a_checkpoint_is_one_line_and_the_same_command_goes_on(preset: Path, disk: Path) -> None:
    output, ballast = disk / "run", disk / "ballast"
    line = command(preset, output, steps=9, checkpoint_every=3)
    assert run_command(*line, "--stop-after", 4).returncode == EXIT_SAVED_ON_SIGNAL
    fill(ballast)
    full = run_command(*line)
    (error,) = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "No space left on device" in error and str(output) in error
    assert names(output) == ["step-00000003", "step-00000004"]
    ballast.unlink()
    assert run_command(*line).returncode == 0
    assert len(losses(output)) == 9


def test_wandb_that_fails_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(TrackingConfig(wandb="offline"), tmp_path, "run", {}, start=0)

    def gone(*_: object, **__: object) -> None:
        raise ConnectionResetError("the service is gone")

    run = tracker._run
    monkeypatch.setattr(run, "log", gone)
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    run.finish()
    assert capsys.readouterr().err.count("WARNING: wandb takes no numbers (ConnectionResetError") == 1
    assert len(losses(tmp_path)) == 3


def test_trained_values_are_checked_even_where_the_file_is_readable(
    preset: Path, output: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = output / "checkpoints" / "step-00000004" / "student" / "rank-00000.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + torch.finfo(torch.float32).eps
    save_file(tensors, path)
    go_on(preset, output, world)
    assert "another SHA-256 than was written" in capsys.readouterr().out
