"""Gradient magnitude similarity deviation on luma (Xue et al., "Gradient Magnitude Similarity Deviation: A
Highly Efficient Perceptual Image Quality Index", 2014): a full-reference metric without weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d
from torch import Tensor

from metrics.frame_metric import FrameMetric
from metrics.luma import luma

#: the constant T of the paper, for planes in [0, 255]
_STABILISER = 170.0


class Gmsd(FrameMetric):
    """GMSD on Y, mean over frames; 0 for identical frames, larger is worse."""

    name = "gmsd"
    label = "GMSD"
    lower_is_better = True
    needs_reference = True

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        assert reference is not None
        return gmsd_plane(luma(frame), luma(reference))


def gmsd_plane(x: NDArray[np.float64], y: NDArray[np.float64], border: str = "nearest", lost_degrees: int = 0) -> float:
    """GMSD of two planes (H, W) in [0, 255].

    Args:
        border: what lies outside, as scipy.ndimage names it.
        lost_degrees: the deviation divides by as many less than the pixels.
    """
    gradient_x, gradient_y = (_gradient_magnitude(_halve(plane), border) for plane in (x, y))
    similarity = (2 * gradient_x * gradient_y + _STABILISER) / (gradient_x**2 + gradient_y**2 + _STABILISER)
    return float(np.std(similarity, ddof=lost_degrees))


def _halve(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each 2×2 block; an odd last row or column is left out."""
    height, width = (size // 2 * 2 for size in plane.shape)
    return plane[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))


def _gradient_magnitude(plane: NDArray[np.float64], border: str) -> NDArray[np.float64]:
    """Prewitt gradient with kernels that sum to 1 on each side."""
    difference, mean = [1.0, 0.0, -1.0], [1 / 3, 1 / 3, 1 / 3]
    horizontal = correlate1d(correlate1d(plane, difference, axis=1, mode=border), mean, axis=0, mode=border)
    vertical = correlate1d(correlate1d(plane, difference, axis=0, mode=border), mean, axis=1, mode=border)
    return np.hypot(horizontal, vertical)
