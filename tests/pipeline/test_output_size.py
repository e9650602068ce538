"""Sizes of the output, of what the model is given, and of the written file."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.errors import UserError
from common.psnr import psnr_db
from common.video_probe import probe
from common.video_reader import read_video
from common.video_writer import VideoWriter
from pipeline.output_size import choose_size, parse_size
from pipeline.upscale import main


@pytest.mark.parametrize(
    ("options", "given", "output"),
    [
        ({}, (320, 180), (1280, 720)),
        ({"scale": 4.0}, (320, 180), (1280, 720)),
        ({"scale": 2.0}, (320, 180), (640, 360)),
        ({"scale": 1.5}, (240, 135), (480, 270)),
        ({"scale": 1.0}, (160, 90), (320, 180)),
        ({"scale": 6.0}, (320, 180), (1920, 1080)),
        ({"lines": 1080}, (320, 180), (1920, 1080)),
        ({"lines": 720, "max_size": 640}, (320, 180), (640, 360)),
        ({"max_size": 4000}, (320, 180), (1280, 720)),
        ({"size": (1000, 720)}, (320, 180), (1000, 720)),
        ({"size": (1001, 721)}, (320, 180), (1000, 720)),
        ({"size": (1001, 721), "even": False}, (320, 180), (1001, 721)),
        ({"max_size": 801, "even": False}, (320, 180), (801, 451)),
    ],
)
def test_sizes(options: dict[str, object], given: tuple[int, int], output: tuple[int, int]) -> None:
    size = choose_size(320, 180, **options)  # type: ignore[arg-type]
    assert (size.model_input, size.output) == (given, output)


def test_a_stretched_output_keeps_its_shape_on_the_screen() -> None:
    size = choose_size(720, 576, Fraction(16, 15), size=(1920, 1080))
    assert Fraction(1920, 1080) * size.sample_aspect_ratio == Fraction(720, 576) * Fraction(16, 15)


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": 100.0}, {"lines": -2}, {"max_size": 4}])
def test_impossible_sizes_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"sides are 8 to 16384 px; change --scale"):
        choose_size(320, 180, **options)  # type: ignore[arg-type]


def test_no_side_is_larger_than_allowed() -> None:
    assert choose_size(64, 48, max_size=99).output == (98, 74)


def test_a_size_has_two_sides() -> None:
    assert parse_size("1920x1080") == (1920, 1080)
    with pytest.raises(ValueError, match="not enough values"):
        parse_size("1920")


def test_the_command_writes_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8), (64, 48))
    source, output = tmp_path / "in.mkv", tmp_path / "out.mkv"
    with VideoWriter(source, width=64, height=48, frame_rate=Fraction(24), quality="lossless") as writer:
        writer.write(np.stack([smooth] * 3))
    for option, (width, height) in (
        (("--size", "101x96"), (100, 96)),
        (("--scale", "2"), (128, 96)),
        (("--height", "120"), (160, 120)),
        (("--size", "100x96"), (100, 96)),
        (("--max-size", "80"), (80, 60)),
    ):
        command = ["upscale", str(source), str(output), "--bicubic", "--lossless", "--overwrite", *option]
        monkeypatch.setattr(sys, "argv", command)
        main()
        info, frames = probe(output), read_video(output)
        assert (info.width, info.height, len(frames)) == (width, height, 3)
        expected = cv2.resize(smooth, (width, height), interpolation=cv2.INTER_CUBIC).astype(float)
        assert psnr_db(np.square(frames[1] - expected).mean(), 255) > 38
