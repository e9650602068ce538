"""Atomic files and folders: complete or absent, also when the block fails, the process is killed, the disk is full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.atomic import atomic_file, atomic_folder, write_atomic
from common.errors import UserError


def test_a_file_appears_only_after_the_block(tmp_path: Path) -> None:
    path = tmp_path / "new" / "video.mp4"
    with atomic_file(path) as temporary:
        temporary.write_text("content")
        assert not path.exists()
        assert temporary.suffix == ".mp4" and temporary.parent == path.parent
    assert path.read_text() == "content"
    assert os.listdir(path.parent) == ["video.mp4"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), OSError(28, "No space left on device")])
def test_a_failure_leaves_the_older_file_and_nothing_else(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "metrics.json"
    write_atomic(path, "old")
    with pytest.raises((RuntimeError, UserError)) as raised, atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["metrics.json"]
    if isinstance(error, OSError):
        assert str(path) in str(raised.value) and "No space left" in str(raised.value)


def test_a_folder_replaces_an_older_one_or_leaves_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_folder(folder) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / "weights").write_text(content)
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert (folder / "inner" / "weights").read_text() == "second"
    assert os.listdir(tmp_path) == ["model"]


def test_a_killed_writer_leaves_the_older_content(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    code = (
        "import os, signal; from pathlib import Path; from common.atomic import atomic_file\n"
        f"with atomic_file(Path({str(path)!r})) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert path.read_text() == "old"
