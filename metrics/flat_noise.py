"""Noise where the reference is flat: what a generative model adds to a sky."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metrics.frame_metric import FrameMetric
from metrics.luma import luma

#: share of the reference's pixels that count as flat: those with the smallest local deviation [ours]
FLAT_SHARE = 0.1
#: side of the window of that deviation, px
WINDOW = 9
#: grey levels; noise below it is not seen, and a black reference has none
FLOOR = 0.25
#: second differences along both axes: blind to planes and ramps (Immerkær 1996)
_LAPLACIAN = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float64)


class FlatNoise(FrameMetric):
    """Standard deviation of the noise on the flattest tenth of the reference, divided by the reference's own there;
    mean over frames. 1: as much as the reference [noise estimate: Immerkær, CVIU 1996]."""

    name = "noise"
    label = "Noise"
    lower_is_better = True
    needs_reference = True

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        assert reference is not None
        mine, theirs = luma(frame), luma(reference)
        flat = flattest(theirs)
        return max(noise_sigma(mine, flat), FLOOR) / max(noise_sigma(theirs, flat), FLOOR)


def flattest(plane: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where the local deviation is within the smallest `FLAT_SHARE`."""
    size = (WINDOW, WINDOW)
    variance = cv2.blur(np.square(plane), size) - np.square(cv2.blur(plane, size))
    return np.asarray(variance <= np.quantile(variance, FLAT_SHARE))


def noise_sigma(plane: NDArray[np.float64], where: NDArray[np.bool_]) -> float:
    """Standard deviation of Gaussian noise, grey levels: √(π/2)/6 · mean|Laplacian|."""
    response = np.abs(cv2.filter2D(plane, cv2.CV_64F, _LAPLACIAN, borderType=cv2.BORDER_REFLECT_101))
    return float(np.sqrt(np.pi / 2) / 6 * response[where].mean())
