"""A stream of frames: the bytes of the whole video, each as soon as its window is complete."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from pipeline.session import Session
from pipeline.video_windows import Windows, upscale_video
from pipeline.vsr_pipeline import VSRPipeline, open_pipeline

WINDOWS = Windows(9, 2)


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> VSRPipeline:
    return open_pipeline(model_folder)


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    """38 frames of two scenes."""
    noise = np.random.default_rng(0).integers(0, 16, (38, 16, 24, 3), np.uint8)
    noise[15:] += 200
    return noise


@pytest.fixture(scope="module")
def whole(pipeline: VSRPipeline, video: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(frames that were read before it came, clip) of the video in one piece."""
    read = 0

    def counted():
        nonlocal read
        for frame in video:
            read += 1
            yield frame

    return [(read, clip) for clip, _ in upscale_video([pipeline], counted(), WINDOWS, statistics={}, seed=3)]


@pytest.mark.parametrize("size", [1, 4, 9, 21, 38])
def test_chunks_of_any_size_give_the_bytes_of_the_whole(pipeline, video, whole, size):
    with Session(pipeline, WINDOWS, seed=3) as session:
        clips = []
        for first in range(0, len(video), size):
            chunk = video[first : first + size].copy()
            clips.append(session.step(chunk))
            chunk[:] = 0  # callers may use their buffer again
        clips.append(session.finish())
    wanted = np.concatenate([clip for _, clip in whole])
    assert np.concatenate(clips).tobytes() == wanted.tobytes() and len(wanted) == len(video)


def test_frames_come_with_the_last_frame_that_they_need(pipeline, video, whole):
    came: list[int] = []
    with Session(pipeline, WINDOWS, seed=3) as session:
        for number, frame in enumerate(video, 1):
            came += [number] * len(session.step(frame[None]))
        came += [len(video)] * len(session.finish())
    assert came == [read for read, clip in whole for _ in clip] and came[0] < len(video)


def test_depth_and_an_empty_stream(pipeline, video):
    with Session(pipeline, WINDOWS, bit_depth=10) as session:
        early = session.step(video[:1])
        rest = session.finish()
    assert early.shape == (0, 64, 96, 3) and rest.shape == (1, 64, 96, 3)
    assert early.dtype == rest.dtype == np.uint16
    with Session(pipeline) as session:
        assert len(session.finish()) == 0


def test_misuse_and_errors_are_raised_and_leave_no_thread(pipeline, video):
    before = threading.active_count()
    with Session(pipeline, WINDOWS) as session:
        session.step(video[:3])
        for wrong in (video[0], video[:2, :8], video[:2].astype(np.float32), video[:2].astype(np.uint16)):
            with pytest.raises(ValueError, match=r"expected|in a video of"):
                session.step(wrong)
        assert len(session.finish()) == 3, "what was refused has changed nothing"
        with pytest.raises(ValueError, match="has ended"):
            session.step(video[:1])
    with Session(pipeline, WINDOWS, codec="fast") as session, pytest.raises(UserError, match="fast_decoder"):
        session.step(video)
    with pytest.raises(KeyError), Session(pipeline, WINDOWS) as session:
        session.step(video[:3])
        raise KeyError
    assert threading.active_count() == before
