"""Several devices on one video: the same frames as from one, in order; errors end the job."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np
import pytest
import torch

from common.video_probe import ffmpeg_binary
from common.video_reader import read_video
from pipeline.video_windows import Windows, upscale_video
from pipeline.vsr_pipeline import VSRPipeline, VSRResult, open_pipeline

WINDOWS = Windows(9, 2)


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> VSRPipeline:
    return open_pipeline(model_folder)


def video(frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(100, 116, (frames, 16, 16, 3), np.uint8)


def test_both_work_and_every_frame_is_as_from_one(pipeline: VSRPipeline) -> None:
    both, worked = threading.Barrier(2, timeout=60), set()

    class Device:
        def __call__(self, *arguments: Any, **options: Any) -> VSRResult:
            if self not in worked:
                worked.add(self)
                both.wait()  # each goes on once the other has a window, too
            return pipeline(*arguments, **options)

    one, two = ({"statistics": {}} for _ in range(2))
    alone = [clip for clip, _ in upscale_video([pipeline], iter(video(38)), WINDOWS, **one)]
    shared = [clip for clip, _ in upscale_video([Device(), Device()], iter(video(38)), WINDOWS, **two)]  # type: ignore[list-item]
    for mine, theirs in zip(alone, shared, strict=True):
        assert np.array_equal(mine, theirs)
    assert len(worked) == 2 and one["statistics"]["dit_evaluations"] == two["statistics"]["dit_evaluations"]


def test_an_error_on_one_of_them_ends_the_video(pipeline: VSRPipeline) -> None:
    def full(*_: Any, **__: Any) -> VSRResult:
        raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(torch.cuda.OutOfMemoryError, match="full"):
        list(upscale_video([full, pipeline], iter(video(30)), WINDOWS, statistics={}))  # type: ignore[list-item]


def test_the_command_gives_the_same_file(upscale: Any, model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.mkv"
    ffmpeg.input("testsrc=size=32x24:rate=25:duration=1", f="lavfi").output(str(source), loglevel="error").run(
        cmd=ffmpeg_binary()
    )
    options = ("--model", model_folder, "--window", 9, "--overlap", 2, "--lossless")
    for name, more in (("one", ()), ("two", ("--devices", "cpu,cpu"))):
        done = upscale(source, tmp_path / f"{name}.mkv", *options, *more)
        assert done.returncode == 0, done.stderr
    assert np.array_equal(read_video(tmp_path / "one.mkv"), read_video(tmp_path / "two.mkv"))


def test_one_that_is_not_there_is_one_line(upscale: Any, model_folder: Path, tmp_path: Path) -> None:
    done = upscale(tmp_path / "in.mkv", tmp_path / "out.mkv", "--model", model_folder, "--devices", "0,tpu")
    assert done.returncode == 2 and "--device tpu: choose cpu, cuda" in done.stderr
    source = tmp_path / "in.mkv"
    ffmpeg.input("testsrc=size=32x24:rate=25:duration=0.2", f="lavfi").output(str(source), loglevel="error").run(
        cmd=ffmpeg_binary()
    )
    number = torch.cuda.device_count()
    options = ("--model", model_folder, "--device", f"cuda:{number}", "--window", 5, "--overlap", 1)
    assert upscale(source, tmp_path / "out.mkv", *options, "--dry-run").returncode == 0
    done = upscale(source, tmp_path / "out.mkv", *options)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "PyTorch sees" in done.stderr
