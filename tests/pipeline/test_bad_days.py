"""Killed at any moment, two at once, a full disk, a folder that is read-only: one line, no stray file, same bytes."""

import os
import re
import subprocess
import time

import pytest

from common.video_probe import ffmpeg_binary
from tests.commands import run, start
from tests.small_disk import mounted

#: two parts
OPTIONS = ("--bicubic", "--part-frames", 16)


@pytest.fixture
def video(tmp_path):
    """1 s of 64x48 at 25 frames/s with a tone; noise, so that its upscaled file is of some size."""
    path = tmp_path / "in" / "in.mp4"
    path.parent.mkdir()
    sources = (
        "-f",
        "lavfi",
        "-i",
        "testsrc2=s=64x48:r=25:d=1",
        "-f",
        "lavfi",
        "-i",
        "sine=d=1",
        "-vf",
        "noise=alls=40",
    )
    subprocess.run([ffmpeg_binary(), "-v", "error", *sources, str(path)], check=True)
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of half a megabyte."""
    with mounted(tmp_path / "disk", "512k") as folder:
        yield folder


def test_killed_whenever_a_file_appears(video, tmp_path):
    """SIGKILL at each name that no run before has shown: parts, their records, joining, the output. Then it goes on."""
    folder = tmp_path / "out"
    output, line = folder / "out.mp4", ("-m", "pipeline.upscale", video, folder / "out.mp4", *OPTIONS)
    whole = tmp_path / "whole.mp4"
    assert run(*line[:3], whole, *OPTIONS).returncode == 0

    def names():
        """Of what is kept, without the process's number, which temporary files have in theirs."""
        # os.walk, not rglob: a folder may go while it is looked at
        files = {re.sub(r"\.\d+\.partial", ".partial", name) for _, _, found in os.walk(folder) for name in found}
        return {name for name in files if not name.startswith((".lock", "black", ".black"))}

    seen, kills = set(), 0
    while True:
        process = start(*line)
        while process.poll() is None and not names() - seen:
            time.sleep(0.0005)
        if process.poll() is not None:
            break
        seen |= names()
        process.kill()
        process.wait(60)
        kills += 1
    _, errors = process.communicate(60)
    # The last kill may have come when all was done, and only the process itself was left.
    assert process.returncode == 0 or "it exists; choose another name" in errors, errors
    assert kills >= 10, seen
    assert any("joined" in name or "output" in name for name in seen), "none while it was joined"
    assert os.listdir(folder) == ["out.mp4"] and output.read_bytes() == whole.read_bytes()


def test_killed_while_it_tidied_up_it_was_complete_already(video, tmp_path):
    """The mark of the finished run goes last; then a folder with nothing but its lock."""
    folder = tmp_path / "out"
    parts, line = folder / ".out.mp4.parts", ("-m", "pipeline.upscale", video, folder / "out.mp4", *OPTIONS)
    process, job = start(*line), ""
    while process.poll() is None and not job:
        job = (parts / "job.json").read_text() if (parts / "job.json").exists() else ""
    assert process.wait(120) == 0 and os.listdir(folder) == ["out.mp4"]
    parts.mkdir()
    (parts / "finished").write_text(job)
    again = run(*line)
    assert again.returncode == 0 and "was complete already" in again.stderr
    assert os.listdir(folder) == ["out.mp4"]
    parts.mkdir()
    (parts / ".lock").touch()
    again = run(*line)
    assert again.returncode == 2 and "it exists" in again.stderr
    assert os.listdir(folder) == ["out.mp4"]


def test_of_two_at_once_one_writes_and_one_says_so(video, tmp_path):
    folder = tmp_path / "out"
    line = ("-m", "pipeline.upscale", video, folder / "out.mp4", *OPTIONS)
    both = [start(*line), start(*line)]
    errors = [process.communicate(120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    loser = errors[0] if both[0].returncode else errors[1]
    assert "another job is writing here" in loser or "it exists" in loser
    assert len(loser.strip().splitlines()) == 1 and os.listdir(folder) == ["out.mp4"]
    whole = tmp_path / "whole.mp4"
    assert run(*line[:3], whole, *OPTIONS).returncode == 0
    assert (folder / "out.mp4").read_bytes() == whole.read_bytes()


def test_a_full_disk_is_one_line_and_the_parts_stay(video, small_disk, upscale, tmp_path):
    """Space freed, the same command goes on."""
    output, filler = small_disk / "out.mp4", small_disk / "filler"
    whole = tmp_path / "whole.mp4"
    assert upscale(video, whole, *OPTIONS, "--crf", 1).returncode == 0
    done = upscale(video, output, "--bicubic", "--scale", 16, "--encoder-options", "preset=ultrafast")
    assert done.returncode == 2 and "GiB of disk are needed for a while" in done.stderr.splitlines()[0]
    filler.write_bytes(bytes(300_000))
    done = upscale(video, output, *OPTIONS, "--crf", 1)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: cannot write ") and "free space" in last, done.stderr
    assert not output.exists()
    filler.unlink()
    done = upscale(video, output, *OPTIONS, "--crf", 1)
    assert done.returncode == 0 and "resuming after" in done.stderr, done.stderr
    assert os.listdir(small_disk) == ["out.mp4"] and output.read_bytes() == whole.read_bytes()


def test_a_read_only_folder_is_one_line_before_the_first_frame(video, small_disk, upscale):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for output in (small_disk / "out.mp4", small_disk / "new" / "f_%03d.png"):
        done = upscale(video, output, *OPTIONS)
        assert done.returncode == 2 and "is not a folder to write in" in done.stderr
        assert "upscaling" not in done.stderr
    assert os.listdir(small_disk) == []
