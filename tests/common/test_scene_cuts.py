"""One definition of a scene cut, for datagen and for upscale."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from common.lossless_clip import write_lossless
from datagen.config import ClipConfig
from datagen.sources import Source
from datagen.survey.video_survey import survey
from pipeline.video_windows import Windows, scenes, split_video


def video(lengths: tuple[int, ...]) -> np.ndarray:
    """Scenes of soft texture that drifts by a px a frame, each of its own brightness."""
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.integers(0, 60, (96, 128 + sum(lengths), 3), dtype=np.uint8), (0, 0), 6)
    frames = []
    for number, length in enumerate(lengths):
        for index in range(length):
            frames.append(texture[:, index : index + 128] + 60 * (number % 3))
    return np.stack(frames).astype(np.uint8)


def test_datagen_and_upscale_cut_at_the_same_frames(tmp_path: Path) -> None:
    frames = video((20, 14, 25))
    write_lossless(tmp_path / "video.mkv", frames)
    source = Source("video.mkv", str(tmp_path / "video.mkv"))
    found = survey(source, source.path, ClipConfig(frames=9, crop=(64, 64)))
    cuts = [number for number, cut, _ in scenes(iter(frames)) if cut]
    assert list(found.cuts) == cuts == [20, 34]


def test_every_frame_comes_out_once_in_order_and_no_window_holds_a_cut() -> None:
    frames = video((20, 14, 25))
    assert [number for number, _, _ in scenes(iter(frames))] == list(range(59))
    assert all(np.array_equal(frame, frames[number]) for number, _, frame in scenes(iter(frames)))
    for start, _, window in split_video(iter(frames), Windows(9, 2)):
        assert not any(start < cut < start + len(window) for cut in (20, 34))


def test_context_before_a_place_gives_the_cuts_of_the_uninterrupted_video() -> None:
    frames = video((20, 14, 25))
    for first in (16, 17, 18, 19, 20, 21):
        again = [number for number, cut, _ in scenes(iter(frames[first - 4 :]), first, 4) if cut]
        assert again == [cut for cut in (20, 34) if cut >= first]
