"""What goes wrong at the command line: one clear line, exit status 2, nothing left behind but a finished survey."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from common.errors import UserError
from common.lossless_clip import UnreadableVideo, write_lossless
from common.storage import StorageConfig, open_folder
from datagen.config import DatagenConfig
from datagen.job_folder import check_limit, writing
from datagen.sources import Source
from datagen.survey.decoder_process import decode_isolated, survey_isolated
from datagen.survey.source_survey import Unreadable
from datagen.survey.survey_cache import SURVEYS_PER_FILE, survey_all
from tests.commands import run
from tests.datagen.conftest import build_command, moving_picture, one_line, refused

LOCAL = StorageConfig()


def test_an_empty_folder(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "no video found" in refused_at_once(config_file, tmp_path / "in", tmp_path / "out")


def test_an_unknown_key(config_file: Path, videos: Path, tmp_path: Path) -> None:
    line = refused_at_once(config_file, videos, tmp_path / "out", "--set", "datagen.clip.frame=9")
    assert "unknown key datagen.clip.frame; did you mean 'frames'?" in line


def test_a_missing_vae(config_file: Path, videos: Path, tmp_path: Path) -> None:
    line = refused_at_once(config_file, videos, tmp_path / "out", "--set", "model.vae=nowhere")
    assert "nowhere holds no VAE" in line


def refused_at_once(config: Path, videos: Path, output: Path, *more: str) -> str:
    """The one line that the command says before it exits with status 2 and leaves nothing."""
    line = refused(config, videos, output, *more)
    assert not output.exists()
    return line


@pytest.mark.distributed
def test_a_text_file_named_mp4_and_a_clip_shorter_than_the_window(config_file: Path, tmp_path: Path) -> None:
    write_lossless(tmp_path / "in/short.mkv", moving_picture(8, 80, 96, 0))
    (tmp_path / "in/text.mp4").write_text("this is no video")
    long = tmp_path / ("long" * 30)  # no Unix socket's path may be
    long.mkdir()
    command = build_command(config_file, tmp_path / "in", tmp_path / "out")
    done = run(*command, environment={"TMPDIR": str(long)}, warm=False)
    line = one_line(done.returncode, done.stderr)
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left == ["part-000000.json"], "more than the survey was left behind"
    assert line.startswith("error: no window can be used")
    assert "short.mkv: length 8 frames is below the window of 9" in line
    assert "text.mp4: not a video" in line


def test_too_many_unreadable_sources_stop_the_job() -> None:
    config = DatagenConfig(max_quarantined=0.1)
    fault = Unreadable(Source("a", "a"), "a: not a video")
    check_limit([fault] * 10, 20, config)  # few
    check_limit([fault] * 20, 200, config)  # not more than a tenth
    for number, sources in ((21, 200), (1, 1), (11, 20)):
        with pytest.raises(UserError, match=f"{number} of {sources} sources cannot be read"):
            check_limit([fault] * number, sources, config)


def test_too_many_unreadable_sources_stop_the_survey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the rest is decoded; what is surveyed stays."""
    sources = [Source(f"{number}", f"/nowhere/{number}") for number in range(3 * SURVEYS_PER_FILE)]

    def surveyed_by_ray(missing: list[Source], *_: object) -> Iterator[Unreadable]:
        for source in missing:
            asked.append(source.id)
            yield Unreadable(source, f"{source.id}: not a video")

    asked: list[str] = []
    monkeypatch.setattr("datagen.survey.survey_cache._survey", surveyed_by_ray)
    folder, config = open_folder(tmp_path), DatagenConfig()
    check = partial(check_limit, sources=len(sources), config=config)
    for _ in range(2):
        with pytest.raises(UserError, match=f"{SURVEYS_PER_FILE} of {len(sources)} sources cannot be read"):
            survey_all(folder, sources, config, LOCAL, lambda: None, check=check)
    assert len(asked) == SURVEYS_PER_FILE and len(list(tmp_path.glob("survey/*"))) == 1


def test_a_file_that_breaks_off_is_unreadable(tmp_path: Path) -> None:
    write_lossless(tmp_path / "whole.mkv", moving_picture(30, 64, 64, 0))
    content = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    config = DatagenConfig()
    cut, complete = (Source(name, str(tmp_path / name)) for name in ("cut.mkv", "whole.mkv"))
    assert survey_isolated(cut, config, LOCAL).frames < 30
    with pytest.raises(UnreadableVideo, match=r"cut\.mkv"):
        decode_isolated(cut, 20, None, 9, config, LOCAL)
    # the child that answered is still there for the next file
    assert decode_isolated(complete, 20, None, 9, config, LOCAL).shape == (9, 64, 64, 3)


def test_a_decoder_that_hangs_or_dies_costs_its_child(tmp_path: Path) -> None:
    import signal

    from datagen.survey import decoder_process as isolated

    os.mkfifo(tmp_path / "pipe.mkv")  # into which nobody writes
    hasty = DatagenConfig(decode_timeout_s=0.1)
    with pytest.raises(UnreadableVideo, match=r"not decoded within 0\.1 s"):
        decode_isolated(Source("pipe.mkv", str(tmp_path / "pipe.mkv")), 0, None, 9, hasty, LOCAL)

    write_lossless(tmp_path / "a.mkv", moving_picture(9, 64, 64, 0))
    child = isolated._running_child()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    clip = decode_isolated(Source("a.mkv", str(tmp_path / "a.mkv")), 0, None, 9, DatagenConfig(), LOCAL)
    assert clip.shape == (9, 64, 64, 3)


def test_a_second_job_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "out")
    with (
        writing(folder),
        pytest.raises(UserError, match="another job is writing here"),
        writing(open_folder(tmp_path / "out")),
    ):
        raise AssertionError("both were let in")
    assert not (tmp_path / "out").exists()
