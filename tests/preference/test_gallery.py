"""The judges' agreement worked out by hand, and the place that the gallery enlarges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from preference.agreement import agreement
from preference.gallery import most_different


def test_agreement_is_kendalls_tau_with_directions_aligned() -> None:
    first = {"scores": {"lpips": [0.1, 0.2, 0.3], "psnr": [30.0, 20.0, 25.0]}, "combined": [1.0, 0.2, 0.3]}
    second = {"scores": {"lpips": [0.1, 0.1, 0.3], "psnr": [20.0, 20.0, 20.0]}, "combined": [1.0, 0.5, 0.0]}
    found = agreement([first, second])
    # LPIPS: a > b > c, PSNR: a > c > b, so 2 of 3 pairs agree; the second clip's PSNR tells nothing apart
    assert found.tau["lpips", "psnr"] == pytest.approx((2 - 1) / 3)
    assert found.clips == {("lpips", "psnr"): 1, ("lpips", "combined"): 2, ("psnr", "combined"): 1}
    # second clip, tau-b: (2 - 0)/√((3 - 1)·3)
    assert found.tau["lpips", "combined"] == pytest.approx(((2 - 1) / 3 + 2 / math.sqrt(6)) / 2)
    assert found.tau["psnr", "combined"] == pytest.approx(1)
    assert found.ties == {"lpips": pytest.approx(1 / 6), "psnr": pytest.approx(3 / 6)}


def test_the_enlarged_place_is_where_frames_differ_most() -> None:
    a = np.zeros((64, 96, 3), np.uint8)
    b = a.copy()
    b[40:48, 72:80] = 255
    left, top, side = most_different(a, b)
    assert side == 16
    assert left <= 72 and left + side >= 80 and top <= 40 and top + side >= 48
