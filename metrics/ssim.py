"""Structural similarity on luma (Wang et al., "Image quality assessment: from error visibility to structural
similarity", 2004), with the paper's Gaussian window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d
from torch import Tensor

from common.errors import UserError
from metrics.frame_metric import FrameMetric
from metrics.luma import luma

_RADIUS = 5
_SIGMA = 1.5
_C1 = (0.01 * 255) ** 2
_C2 = (0.03 * 255) ** 2


class Ssim(FrameMetric):
    """SSIM on Y in [16, 235] with data range 255, 11×11 window, borders left out, mean over frames."""

    name = "ssim"
    label = "SSIM"
    lower_is_better = False
    needs_reference = True

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        assert reference is not None
        if min(frame.shape[1:]) <= 2 * _RADIUS:
            raise UserError(f"ssim needs frames of at least {2 * _RADIUS + 1} px, not {tuple(frame.shape[1:])}")
        return self.planes(frame, reference)

    def planes(self, x: Tensor, y: Tensor) -> float:
        """SSIM of two frames (3, H, W)."""
        return ssim_plane(luma(x), luma(y))


def ssim_plane(x: NDArray[np.float64], y: NDArray[np.float64], lowest_structure: float = -np.inf) -> float:
    """SSIM of two planes (H, W) in [0, 255]; the structure term is cut at `lowest_structure`."""
    mean_x, mean_y = _window(x), _window(y)
    variance_x = _window(x * x) - mean_x**2
    variance_y = _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float(np.mean(luminance * np.maximum(structure, lowest_structure)))


def _window(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    kernel = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    kernel /= kernel.sum()
    smooth = correlate1d(correlate1d(plane, kernel, axis=0), kernel, axis=1)
    return smooth[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]
