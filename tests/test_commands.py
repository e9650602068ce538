"""A command of the tests is the process that a new interpreter would be (tests/commands.py)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.commands import RUNS_WARM, run, start

SCRIPT = """
import atexit, os, resource, signal, sys
atexit.register(print, "at exit")
print(__name__, __file__, sys.argv, os.getcwd(), sys.path[0], sys.executable, os.environ["OF_THE_TEST"])
print(os.getsid(0) == os.getpid(), signal.getsignal(signal.SIGCHLD), signal.getsignal(signal.SIGTERM))
print(resource.getrlimit(resource.RLIMIT_FSIZE), sys.stdin.read(), sys.stdout.isatty(), "RANK" in os.environ)
print([name for name in sys.modules if name.split(".")[0] in ("common", "pipeline", "trainer", "tests")])
print("an error", file=sys.stderr)
if sys.argv[1] == "raise":
    raise RuntimeError("on purpose")
if sys.argv[1] == "kill":
    sys.stdout.flush(); os.kill(os.getpid(), signal.SIGTERM)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("end", "status"), [("0", 0), ("85", 85), ("raise", 1), ("kill", -signal.SIGTERM)])
def test_it_begins_and_ends_as_a_new_interpreter_does(end: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    line = (tmp_path / "script.py", end)
    options = {"folder": tmp_path, "environment": {"OF_THE_TEST": "1"}, "largest_file": 1 << 20}
    warm, cold = (run(*line, **options, warm=warm) for warm in (True, False))
    assert warm.returncode == cold.returncode == status
    assert warm.stdout == cold.stdout and (end == "kill") == ("at exit" not in warm.stdout)
    assert warm.stderr.splitlines()[-1] == cold.stderr.splitlines()[-1]
    assert warm.stdout.splitlines()[3] == "[]", "nothing of the project was there before it"


@pytest.mark.skipif(not RUNS_WARM, reason="CUDA does not survive a fork: every command is a new interpreter")
def test_it_ends_with_who_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text("import time; time.sleep(600)")
    process = start(tmp_path / "sleep.py")
    assert process.poll() is None
    process._connection.close()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{process.pid}"):
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.05)
