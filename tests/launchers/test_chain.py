"""The chain of all steps: what each reads is what one before it made, and a signal reaches the step that runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers.chain import chain, local_commands, parse_arguments
from launchers.cli import COMMANDS
from launchers.preflight import differences
from launchers.steps import Step, StepRunner


def test_each_step_reads_what_an_earlier_one_made(tmp_path: Path) -> None:
    steps = chain("c.yaml", "videos", tmp_path, ("low", "high"), ["trainer.seed=1"])
    made = {"videos", "low", "high"}
    for step in steps:
        words = step.arguments
        read = [words[words.index(name) + 1] for name in ("--data", "--init", "--teacher", "--model") if name in words]
        read += [words[0]] if step.command == "upscale" else []
        assert step.command in COMMANDS
        assert all(any(folder.startswith(known) for known in made) for folder in read), step
        made.add(words[words.index("--output") + 1] if "--output" in words else words[1])
        assert ("trainer.seed=1" in words) == ("--config" in words)
    commands = local_commands(steps, gpus=1)
    assert commands[1][1:3] == ("-m", "trainer.run") and "deepspeed" in local_commands(steps, gpus=8)[1][0]


def test_options_after_two_dashes_are_for_sbatch() -> None:
    arguments, options = parse_arguments(["c", "v", "o", "--slurm", "--array", "1-4%2", "--", "--qos=high", "--test"])
    assert (arguments.array, options, arguments.test) == ("1-4%2", ["--qos=high", "--test"], None)
    with pytest.raises(SystemExit):
        parse_arguments(["c", "v", "o", "--", "--qos=high"])


def test_term_reaches_the_step_that_runs(tmp_path: Path) -> None:
    waits = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print('saved'))); print('on', flush=True)"
    runner = StepRunner(tmp_path, [step := Step("a", "a", (sys.executable, "-c", f"{waits}; time.sleep(60)"))])

    def terminate() -> None:
        while not (tmp_path / "a.log").exists() or "on" not in (tmp_path / "a.log").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate).start()
    with pytest.raises(SystemExit) as left:
        runner.run(step)
    assert left.value.code == 143 and "saved" in (tmp_path / "a.log").read_text()
    assert not (tmp_path / "a.done").exists() and signal.getsignal(signal.SIGTERM) is before


def test_nodes_that_differ_are_named() -> None:
    def node(host: str, torch: str, gpu: str | None = "H100") -> dict[str, object]:
        return {"host": host, "gpu": gpu, "versions": {"torch": torch}}

    assert differences([node("a", "2.9"), node("b", "2.9")]) == []
    assert differences([node("a", "2.9"), node("b", "2.8"), node("c", "2.9", None)]) == [
        "b (rank 1) has torch 2.8, a has 2.9",
        "c (rank 2) has None, a H100",
    ]
