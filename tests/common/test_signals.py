"""A signal ends a command, also where Python drops the exception that its handler raises."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from common.command_line import EXIT_SIGTERM
from tests.commands import ROOT

PROGRAM = """
import os, signal, sys
from common.command_line import exit_on_signals, raise_if_signalled

class Dropping:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        for _ in range(1000): pass  # the handler runs here

exit_on_signals()
print("begun", flush=True)
if sys.argv[2] == "dropped":
    Dropping()
    print("dropped", flush=True)
    raise_if_signalled()
else:
    os.kill(os.getpid(), int(sys.argv[1]))
    for _ in range(1000): pass
print("went on", flush=True)
"""


@pytest.mark.parametrize("how", ["raised", "dropped"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, EXIT_SIGTERM)])
def test_a_signal_ends_the_process(number: signal.Signals, status: int, how: str) -> None:
    line = [sys.executable, "-c", PROGRAM, str(int(number)), how]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == (["begun"] if how == "raised" else ["begun", "dropped"]), done.stdout
    assert done.returncode == status, done.stderr
