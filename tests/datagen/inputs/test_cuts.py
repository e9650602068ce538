"""No window holds a cut, and a flash is none."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.lossless_clip import write_lossless
from datagen.config import ClipConfig
from datagen.sources import Source
from datagen.survey.source_survey import Unreadable, from_document, to_document
from datagen.survey.video_survey import survey, window_starts
from tests.datagen.conftest import moving_picture
from tests.datagen.inputs.conftest import Make, lavfi, picture, surveyed


def test_no_window_holds_a_cut(make: Make) -> None:
    """Shots of 30, 10 and 50 frames: the one of 10 has no window of 21 frames, and none reaches into it."""
    graph = (
        "[1:v]trim=end_frame=10,setpts=PTS-STARTPTS,format=yuv420p[m];[0:v]format=yuv420p[a];"
        "[2:v]format=yuv420p,negate[b];[a][m][b]concat=n=3[o]"
    )
    shots = lavfi("testsrc2=s=320x240:r=25:d=1.2", "mandelbrot=s=320x240:r=25", "testsrc=s=320x240:r=25:d=2")
    path = make("shots.mp4", *shots, "-filter_complex", graph, "-map", "[o]", "-c:v", "libx264", "-qp", "5")
    found = surveyed(path, frames=21, stride=3)
    assert found.cuts == (30, 40)
    starts = [window.start for window in found.windows]
    assert starts and all(start + 21 <= 30 or start >= 40 for start in starts)
    assert any(start >= 40 for start in starts)


@pytest.mark.parametrize("white", ["eq(mod(n,10),5)", "eq(mod(n,2),1)"], ids=["flashes", "strobe"])
def test_flashes_are_no_cuts(make: Make, white: str) -> None:
    """As for upscaling: tests/pipeline/inputs/test_input_times.py."""
    flashes = f"drawbox=color=white:t=fill:enable='{white}'"
    path = make("flashes.mp4", *picture(2, "64x48"), "-vf", flashes, "-c:v", "libx264", "-qp", "1")
    assert surveyed(path, frames=21).cuts == ()


def test_windows_do_not_cross_scenes(tmp_path: Path) -> None:
    soft = [cv2.GaussianBlur(picture, (0, 0), 6) for picture in moving_picture(42, 96, 128, 1)]
    video = np.stack([*soft[:20], *(picture // 4 for picture in soft[20:])])
    path = tmp_path / "video.mkv"
    write_lossless(path, video)
    source = Source("video.mkv", str(path))
    found = survey(source, str(path), ClipConfig(frames=9, crop=(64, 64)))
    assert found.frames == 42 and found.cuts == (20,)
    assert [window.start for window in found.windows] == [0, 9, 20, 29]
    uncut = survey(source, str(path), ClipConfig(frames=9, crop=(64, 64), respect_scenes=False))
    assert [window.start for window in uncut.windows] == [0, 9, 18, 27]
    assert from_document(json.loads(json.dumps(to_document(found))), source) == found
    unreadable = Unreadable(source, "not a video")
    assert from_document(json.loads(json.dumps(to_document(unreadable))), source) == unreadable


def test_window_starts() -> None:
    assert window_starts(27, [], 9, None) == [0, 9, 18]
    assert window_starts(27, [], 9, 5) == [0, 5, 10, 15]
    assert window_starts(8, [], 9, None) == []
