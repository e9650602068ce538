"""Unsharp mask of the HR clip before it is degraded [peer: Real-ESRGAN]."""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import Field

from common.config import Section
from datagen.degradation.operation import Drawn, Frames, HrShape, Operation

#: the unsharp mask's blur (sigma 8) and soft mask are computed at this fraction of the resolution
SHARPEN_FRACTION = 4


class SharpenConfig(Section):
    """Unsharp mask of the HR clip before it is degraded [peer: Real-ESRGAN]."""

    #: side of the Gaussian blur, px, from which its sigma follows
    kernel_size: int = Field(default=51, ge=9)
    #: factor of the difference from the blurred frame that is added
    weight: float = 0.5
    #: difference from the blurred frame, 0...255, above which a pixel counts as structure
    threshold: float = 10.0


class Sharpen(Operation):
    """Nothing is drawn."""

    name = "sharpen"
    config = SharpenConfig

    def draw(self, config: SharpenConfig, shape: HrShape, rng: np.random.Generator) -> Drawn:
        return config.model_dump()

    def apply(self, drawn: Drawn, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
        size, weight, threshold = drawn["kernel_size"], drawn["weight"], drawn["threshold"]
        return [sharpen_frame(frame, size, weight, threshold) for frame in frames]


def sharpened(clip: np.ndarray, config: SharpenConfig) -> np.ndarray:
    """A clip, uint8 (F, H, W, 3) in either order of the colours."""
    values = (config.kernel_size, config.weight, config.threshold)
    return np.stack([sharpen_frame(frame, *values) for frame in clip])


def sharpen_frame(frame: np.ndarray, size: int, weight: float, threshold: float) -> np.ndarray:
    """Real-ESRGAN's unsharp mask: sharpened where structure is, faded in by the blurred mask of structure."""
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8  # OpenCV's own rule for a Gaussian given by its size
    blurred = _wide_blur(frame, sigma)
    structure = cv2.threshold(cv2.absdiff(frame, blurred), threshold, 255, cv2.THRESH_BINARY)[1]
    fade = _wide_blur(structure, sigma)
    sharp = cv2.addWeighted(frame, 1 + weight, blurred, -weight, 0)
    change = cv2.subtract(sharp, frame, dtype=cv2.CV_16S)
    return cv2.add(frame, cv2.multiply(change, fade, scale=1 / 255, dtype=cv2.CV_16S), dtype=cv2.CV_8U)


def _wide_blur(frame: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of many px, computed at a fraction of the resolution."""
    height, width = frame.shape[:2]
    small_size = (max(1, width // SHARPEN_FRACTION), max(1, height // SHARPEN_FRACTION))
    small = cv2.resize(frame, small_size, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / SHARPEN_FRACTION)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
