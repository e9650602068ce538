"""One writer per folder, across processes; a killed owner's lock is free again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.locking import only_writer

HOLD = """
import sys, time
from pathlib import Path
from common.locking import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {owner.pid}"), only_writer(tmp_path):
            pass
        owner.kill()
        owner.wait()
        with only_writer(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_the_lock_is_released_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), only_writer(tmp_path):
        raise RuntimeError
    with only_writer(tmp_path):
        pass
