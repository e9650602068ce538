"""A run that was stopped, however it was stopped, goes on as if nothing had happened: to the last digit."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from tests.trainer.presets import losses, run_command, signal_after, start_command, write_preset
from tests.trainer.stages import STAGES, make_run
from trainer.checkpoint import latest_checkpoint, list_checkpoints, read_state
from trainer.engine.process_group import World
from trainer.loop import Run, train_loop
from trainer.preemption import EXIT_SAVED_ON_SIGNAL


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset"))


class PowerCut(Exception):
    """Stands for the end of a process in the middle of a step."""


def cut_power(run: Run, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the run die in `step` after its networks have moved, before anything of that step is recorded."""
    train_step = run.stage.train_step

    def dying(number: int, batches: Any) -> dict[str, float]:
        values = train_step(number, batches)
        if number == step:
            raise PowerCut
        return values

    monkeypatch.setattr(run.stage, "train_step", dying)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_goes_on_exactly(
    stage: str, preset: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run(preset, stage, tmp_path / "whole", world)
    assert train_loop(whole)

    dying = make_run(preset, stage, tmp_path / "cut", world)
    cut_power(dying, monkeypatch, step=3)  # one step past the checkpoint of step 2
    with pytest.raises(PowerCut):
        train_loop(dying)
    stopped = make_run(preset, stage, tmp_path / "cut", world, stop_after=1)
    assert not train_loop(stopped)  # from 2 to 3, saved at 3 as on a signal
    last = make_run(preset, stage, tmp_path / "cut", world)
    assert train_loop(last)

    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [row["step"] for row in losses(tmp_path / "whole")] == list(range(whole.steps))
    for name, network in whole.stage.networks.items():
        if network.fragments:
            for ema in (False, True) if network.ema else (False,):
                found, expected = (last.stage.networks[name].full_state_dict(ema=ema), network.full_state_dict(ema=ema))
                assert all(torch.equal(found[key], expected[key]) for key in expected), (name, ema)


def command(preset: Path, output: Path) -> list[object]:
    steps = "trainer.schedules.base={steps: 40, global_batch_size: 4, checkpoint_every: 10, validate_every: 0}"
    data = preset.parent / "clips"
    return ["--config", preset, "--stage", "base", "--data", data, "--output", output, "--set", steps]


@pytest.fixture(scope="module")
def uninterrupted(preset: Path) -> Path:
    output = preset.parent / "uninterrupted"
    result = run_command(*command(preset, output))
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals(number: signal.Signals, preset: Path, uninterrupted: Path, tmp_path: Path) -> None:
    process = start_command(*command(preset, tmp_path / "run"))
    signal_after(process, tmp_path / "run" / "metrics.jsonl", 15, number)
    output, errors = process.communicate(timeout=120)
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == EXIT_SAVED_ON_SIGNAL, errors
        assert "saved" in output
        done = len(losses(tmp_path / "run"))
        assert checkpoints[-1] == f"step-{done:08d}", "saved where it stood"
    assert not (tmp_path / "run" / "model").exists()

    again = run_command(*command(preset, tmp_path / "run"))
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    assert losses(tmp_path / "run") == losses(uninterrupted)
    weights = "model/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (uninterrupted / weights).read_bytes()


@pytest.mark.distributed
def test_full_disk_while_saving(preset: Path, uninterrupted: Path, tmp_path: Path) -> None:
    arguments = command(preset, tmp_path / "run")
    assert run_command(*arguments, "--stop-after", 10).returncode == EXIT_SAVED_ON_SIGNAL
    saved = tmp_path / "run" / "checkpoints" / "step-00000010"
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    half = max(len(content) for content in before.values()) // 2

    # No file may grow beyond half a checkpoint: the write fails as on a full disk.
    full = run_command(*arguments, largest_file=half)
    assert full.returncode == 2
    assert "cannot save" in full.stderr and "step-00000020" in full.stderr and "free space" in full.stderr
    assert "Traceback" not in full.stderr
    assert [path.name for path in saved.parent.iterdir()] == [saved.name], "nothing half-written is left"
    assert {path: path.read_bytes() for path in before} == before

    again = run_command(*arguments)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "run") == losses(uninterrupted)


#: what the stages after `base` (whose tests stand above) start from
LATER = {
    "progressive": ("--init", "base/model"),
    "dual_stream": ("--init", "progressive/model", "--teacher", "progressive/teacher"),
    "preference": ("--init", "dual_stream/model"),
}
LONGER = (
    "trainer.progressive.guidance_iterations=10",
    "trainer.progressive.iterations_per_halving=10",
    *(
        f"trainer.schedules.{stage}={{{steps}global_batch_size: 4, checkpoint_every: 6, validate_every: 0}}"
        for stage, steps in (("progressive", ""), ("dual_stream", "steps: 30, "), ("preference", "steps: 30, "))
    ),
)


@pytest.fixture(scope="module")
def finished(preset: Path, uninterrupted: Path) -> Path:
    """Folders `base`, `progressive`, … of runs that nothing has stopped, each from the one before."""
    folder = preset.parent / "finished"
    folder.mkdir()
    (folder / "base").symlink_to(uninterrupted)
    for stage in LATER:
        result = run_command(*later_command(stage, preset, folder, folder / stage))
        assert result.returncode == 0, result.stderr
    return folder


def later_command(stage: str, preset: Path, models: Path, output: Path) -> list[object]:
    data = preset.parent / ("pairs" if stage == "preference" else "clips")
    line: list[object] = ["--config", preset, "--stage", stage, "--data", data, "--output", output]
    line += [part if part.startswith("--") else models / part for part in LATER[stage]]
    return line + [part for override in LONGER for part in ("--set", override)]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", LATER)
def test_every_later_stage_survives_a_kill_a_signal_and_a_full_disk(
    stage: str, preset: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    line = later_command(stage, preset, finished, output)

    killed = start_command(*line)
    signal_after(killed, output / "metrics.jsonl", 8, signal.SIGKILL)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL

    warned = start_command(*line)
    signal_after(warned, output / "metrics.jsonl", 15, signal.SIGTERM)
    told, errors = warned.communicate(timeout=120)
    assert warned.returncode == EXIT_SAVED_ON_SIGNAL, errors
    assert "going on from" in told
    saved = latest_checkpoint(output / "checkpoints")
    assert saved is not None and saved.name == f"step-{len(losses(output)):08d}"

    full = run_command(*line, largest_file=max(path.stat().st_size for path in saved.rglob("*")) // 2)
    assert full.returncode == 2, full.stderr
    assert "cannot save" in full.stderr and "free space" in full.stderr
    assert latest_checkpoint(output / "checkpoints") == saved
    assert not (output / "model").exists()

    again = run_command(*line)
    assert again.returncode == 0, again.stderr
    assert losses(output) == losses(finished / stage)
    weights = "model/transformer/diffusion_pytorch_model.safetensors"
    assert (output / weights).read_bytes() == (finished / stage / weights).read_bytes()


def test_another_configuration_is_named(preset: Path, tmp_path: Path, world: World, capsys: Any) -> None:
    train_loop(make_run(preset, "base", tmp_path / "run", world, stop_after=1))
    train_loop(make_run(preset, "base", tmp_path / "run", world, stop_after=1, max_bad_steps=7))
    assert "changed since then: trainer.max_bad_steps: 10 -> 7" in capsys.readouterr().out


def test_the_checkpoint_of_another_stage_is_refused(preset: Path, tmp_path: Path, world: World) -> None:
    train_loop(make_run(preset, "base", tmp_path / "run", world, stop_after=1))
    with pytest.raises(UserError, match="is of stage base, not preference; choose another --output"):
        train_loop(make_run(preset, "preference", tmp_path / "run", world))


def test_sigusr1_is_answered_like_sigterm(
    preset: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(preset, "base", tmp_path / "run", world)
    train_step = run.stage.train_step

    def warned(step: int, batches: Any) -> dict[str, float]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(step, batches)

    monkeypatch.setattr(run.stage, "train_step", warned)
    before = signal.getsignal(signal.SIGUSR1)
    assert not train_loop(run)
    assert latest_checkpoint(run.checkpoints) == run.checkpoints / "step-00000003"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_only_the_last_checkpoints_are_kept(preset: Path, tmp_path: Path, world: World) -> None:
    run = make_run(preset, "progressive", tmp_path / "run", world, keep_checkpoints=2)
    assert train_loop(run)
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-00000004", "step-00000006"]


WATCHED = {
    "base": {
        "steps": 8, "global_batch_size": 4, "checkpoint_every": 4, "validate_every": 2, "keep_best": "latent_mse"
    }
}  # fmt: skip


def kept(output: Path) -> tuple[list[str], dict[str, Any]]:
    """Names of the checkpoints and what best.json says."""
    folder = output / "checkpoints"
    return [path.name for path in list_checkpoints(folder)], json.loads((folder / "best.json").read_text())


def test_the_best_checkpoint_is_kept(
    preset: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(preset, "base", tmp_path / "run", world, schedules=WATCHED, keep_checkpoints=1)
    number, values = "validation/x0_at_t_1.0/latent_mse", iter([0.5, math.nan, 0.4, 0.7])
    assert run.validation is not None
    monkeypatch.setattr(run.validation, "look", lambda *_: {number: next(values)})
    assert train_loop(run)
    best = {"number": number, "step": 6, "value": 0.4}
    assert kept(tmp_path / "run") == (["step-00000006", "step-00000008"], best), "6 is no multiple of 4"
    assert read_state(run.checkpoints / "step-00000006")["metrics"] == {number: 0.4}


def test_what_is_best_survives_a_power_cut(
    preset: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run(preset, "base", tmp_path / "whole", world, schedules=WATCHED, keep_checkpoints=1)
    assert train_loop(whole)
    dying = make_run(preset, "base", tmp_path / "cut", world, schedules=WATCHED, keep_checkpoints=1)
    cut_power(dying, monkeypatch, step=5)
    with pytest.raises(PowerCut):
        train_loop(dying)
    (dying.checkpoints / "best.json").unlink()  # as if the power had gone before it was written
    assert train_loop(make_run(preset, "base", tmp_path / "cut", world, schedules=WATCHED, keep_checkpoints=1))
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    unwatched = {"base": WATCHED["base"] | {"keep_best": None}}
    plain = make_run(preset, "base", tmp_path / "plain", world, schedules=unwatched, keep_checkpoints=1)
    assert train_loop(plain)
    assert [path.name for path in plain.checkpoints.iterdir()] == ["step-00000008"]
    assert losses(tmp_path / "plain") == losses(tmp_path / "whole"), "keeping the best changes no number"
