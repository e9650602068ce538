"""`duo-vsr`, progress in a log file, and errors for people."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from common import progress as progress_module
from common.errors import UserError, run_command
from common.progress import progress
from launchers.cli import COMMANDS, command_line, usage


def test_every_command_is_a_module_that_can_be_run():
    for name, (module, _) in COMMANDS.items():
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations:
            spec = importlib.util.find_spec(f"{module}.__main__")
        assert spec is not None and spec.origin is not None, name
        assert '__name__ == "__main__"' in Path(spec.origin).read_text(), name
        assert name in usage()


def test_commands_are_spelt_out():
    assert command_line(["upscale", "a.mp4"]) == [sys.executable, "-m", "pipeline.upscale", "a.mp4"]
    launcher, *rest = command_line(["train", "--stage", "base"])
    assert Path(launcher).name == "deepspeed" and rest[-4:] == ["--module", "trainer.run", "--stage", "base"]
    with pytest.raises(ValueError, match="no command 'upscael'"):
        command_line(["upscael"])


def test_the_command_becomes_the_other():
    done = subprocess.run([sys.executable, "-m", "launchers.cli", "prompts"], capture_output=True, text=True)
    assert done.returncode == 2 and "--placeholder" in done.stderr


def test_progress_in_a_log_is_plain_lines_with_rate_and_estimate(capsys, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(clock)) * 40)
    with progress(4, "clips", "clip", start=2) as counter:
        counter.advance(failed=1)
        counter.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("clips: 3/4 clip, ") and "s left" in lines[0] and lines[0].endswith("failed 1")
    assert lines[1].startswith("clips: 4/4 clip, ")
    assert counter.done == 4


def test_an_error_for_people_is_one_line_and_status_2(capsys):
    def fails() -> None:
        raise UserError("no such video")

    with pytest.raises(SystemExit) as left:
        run_command(fails)
    assert left.value.code == 2 and capsys.readouterr().err == "error: no such video\n"
