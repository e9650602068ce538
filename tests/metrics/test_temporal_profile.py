"""The temporal profile of a clip whose every pixel is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from metrics import temporal_profile
from metrics.clips import open_clip
from metrics.labelled_grid import LABEL
from metrics.temporal_profile import profile


@pytest.fixture
def clip(tmp_path: Path) -> tuple[Path, np.ndarray]:
    frames = np.random.default_rng(0).integers(0, 256, (5, 12, 40, 3), np.uint8)
    np.save(tmp_path / "clip.npy", frames)
    return tmp_path / "clip.npy", frames


def test_a_row_and_a_column_over_time(clip: tuple[Path, np.ndarray]) -> None:
    path, frames = clip
    assert np.array_equal(profile(open_clip(path), row=7), frames[:, 7])
    assert np.array_equal(profile(open_clip(path), column=31), frames[:, :, 31].swapaxes(0, 1))
    assert np.array_equal(profile(open_clip(path, 2), row=0), frames[:2, 0])


def test_the_command_stacks_them(clip: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    path, frames = clip
    line = ["--clip", f"a={path}", "--clip", f"b={path}", "--output", str(path.with_name("p.png"))]
    monkeypatch.setattr(sys, "argv", ["profile", *line, "--row", "3"])
    temporal_profile.main()
    with Image.open(path.with_name("p.png")) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 * (5 + LABEL), 40, 3)
    assert np.array_equal(pixels[LABEL : LABEL + 5], frames[:, 3]) and np.array_equal(pixels[-5:], frames[:, 3])
    monkeypatch.setattr(sys, "argv", ["profile", *line, "--column", "40"])
    with pytest.raises(UserError, match="is 5 frames of 40×12: give a --row or --column inside it, not 40"):
        temporal_profile.main()
