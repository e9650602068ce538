"""The project's commands in processes of their own, without the seconds that importing the libraries takes.

    done = run("-m", "pipeline.upscale", video, output)
    running = start(ROOT / "trainer/run.py", "--stage", "base")
    running.kill()

Each is a fork of a process that has imported the libraries (tests/warm_server.py). With `warm=False` it is a new
interpreter, as are all on a machine with a GPU: CUDA does not survive a fork.
"""

from __future__ import annotations

import functools
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.warm_python import request

ROOT = Path(__file__).resolve().parents[1]
#: what a launcher tells its ranks: not for the commands that a test starts
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
RUNS_WARM = not torch.cuda.is_available()


class Command:
    """A running process; what it writes is read when it has ended. Named as in `subprocess.Popen`."""

    def __init__(self, task: dict[str, Any], stdin: int, stdout: int | None, warm: bool) -> None:
        self.args: list[str] = task["line"]
        self.returncode: int | None = None
        self._written = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        output, errors = (file.fileno() for file in self._written)
        files = (stdin, output if stdout is None else stdout, errors)
        if warm:
            self._connection, self.pid = request(_server(), task, files)
            self._process = None
        else:
            self._process = _new_interpreter(task, files)
            self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait; returns all of standard output and standard error."""
        self.wait(timeout)
        output, errors = (os.pread(file.fileno(), 1 << 30, 0).decode() for file in self._written)
        return output, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is not None:
            return self.returncode
        if self._process is not None:
            try:
                self.returncode = self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
        elif select.select([self._connection], [], [], seconds)[0]:
            self.returncode = int(self._connection.recv(64))
            self._connection.close()
        return self.returncode


def start(
    *line: object,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    stdin: int | None = None,
    stdout: int | None = None,
    largest_file: int | None = None,
    warm: bool = True,
    warm_children: bool = False,
) -> Command:
    """Start a command in a session of its own.

    Args:
        line: "-m" and a module, or a script; its arguments.
        environment: added to this process's own.
        folder: its working directory.
        stdin, stdout: descriptors; None: empty, and kept for `communicate`.
        largest_file: bytes beyond which no file may grow, as on a full disk.
        warm: whether the libraries are there already.
        warm_children: whether they are for the Python processes that the command starts.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    inherited |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    warm = warm and RUNS_WARM
    task = {
        "line": [str(word) for word in line],
        "environment": inherited | dict(environment or {}),
        "folder": str(folder),
        "largest_file": largest_file,
        "python": python() if warm and warm_children else sys.executable,
    }
    with open(os.devnull) as nothing:
        return Command(task, nothing.fileno() if stdin is None else stdin, stdout, warm)


def run(*line: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """Start a command as `start` does, and wait for its end."""
    command = start(*line, **options)
    try:
        output, errors = command.communicate(timeout)
    finally:
        command.kill()
    assert command.returncode is not None
    return subprocess.CompletedProcess(command.args, command.returncode, output, errors)


def python() -> str:
    """What stands in for `sys.executable`, so that processes started with it have the libraries imported."""
    return str(Path(_server()).with_name("python")) if RUNS_WARM else sys.executable


def launch(ranks: int, *line: object, **options: Any) -> Command:
    """Start a command through the deepspeed launcher."""
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", ranks]
    return start(*launcher, "--master_port", 29600 + os.getpid() % 300, *line, warm_children=True, **options)


def _new_interpreter(task: dict[str, Any], files: tuple[int, int, int]) -> subprocess.Popen[bytes]:
    def limit() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in tests/warm_server.py
        if task["largest_file"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest_file"],) * 2)

    stdin, stdout, stderr = files
    return subprocess.Popen(
        [sys.executable, *task["line"]],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=task["folder"],
        env=task["environment"],
        start_new_session=True,
        preexec_fn=limit,
    )


@functools.cache
def _server() -> str:
    """The address of this process's own server, which ends with it and removes the folder."""
    folder = tempfile.mkdtemp(prefix="duo-vsr-tests-")
    address, python = Path(folder, "socket"), Path(folder, "python")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {ROOT / "tests/warm_python.py"} {address} "$@"\n')
    python.chmod(0o700)
    environment = {name: value for name, value in os.environ.items() if name not in (*LAUNCHED, "PYTHONPATH")}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/warm_server.py", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert b"ready\n" in iter(process.stdout.readline, b"")
    _kept.append(process)
    return str(address)


_kept: list[subprocess.Popen[bytes]] = []
