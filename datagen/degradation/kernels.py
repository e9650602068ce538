"""Blur kernels, all frames of a clip at once, and their fast application.

The shapes are those of Real-ESRGAN's second-order degradation (generalised and plateau-like Gaussians after
Pascal et al. 2013, the circular low-pass of a jinc); equal to BasicSR's for equal parameters.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy import special

#: how far the separable approximation of a kernel may be from it, as the sum of absolute differences: half a grey
#: level in the worst picture there can be, before rounding to 8 bit
TOLERANCE = 0.5 / 255


def gaussian_kernels(
    kind: str, size: int, sigma_x: np.ndarray, sigma_y: np.ndarray, rotation: np.ndarray, beta: np.ndarray
) -> np.ndarray:
    """Kernels (F, size, size), float64, each with sum 1.

    Args:
        kind: `iso`, `aniso`, or these after `generalized_` or `plateau_`; isotropic ones use `sigma_x` alone.
        sigma_x, sigma_y, rotation, beta: (F,), in px, rad, and the exponent of generalised and plateau kernels.
    """
    if kind.endswith("aniso"):
        cos, sin = np.cos(rotation), np.sin(rotation)
        turn = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
        variances = np.stack([sigma_x**2, sigma_y**2], -1)
        covariance = (turn * variances[:, None, :]) @ turn.transpose(0, 2, 1)
    else:
        covariance = (sigma_x**2)[:, None, None] * np.eye(2)
    axis = np.arange(size) - size // 2
    grid = np.stack(np.meshgrid(axis, axis), -1).astype(np.float64)
    distance = np.einsum("yxi,fij,yxj->fyx", grid, np.linalg.inv(covariance), grid)
    exponent = beta[:, None, None]
    if kind.startswith("plateau"):
        kernels = 1 / (1 + distance**exponent)
    elif kind.startswith("generalized"):
        kernels = np.exp(-0.5 * distance**exponent)
    else:
        kernels = np.exp(-0.5 * distance)
    return kernels / kernels.sum((1, 2), keepdims=True)


def sinc_kernels(size: int, cutoff: np.ndarray) -> np.ndarray:
    """Circular low-pass kernels (F, size, size), float64, sum 1, for cut-off frequencies (F,) in rad."""
    axis = np.arange(size) - size // 2
    radius = np.hypot(*np.meshgrid(axis, axis))
    radius[size // 2, size // 2] = 1  # the limit is put in below
    omega = cutoff[:, None, None]
    kernels = omega * special.j1(omega * radius) / (2 * np.pi * radius)
    kernels[:, size // 2, size // 2] = cutoff**2 / (4 * np.pi)
    return kernels / kernels.sum((1, 2), keepdims=True)


def apply_kernel(picture: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Filter (H, W, 3) uint8 by a kernel, reflecting at the borders; rounded to uint8.

    A kernel is cut to its support and split by SVD into as few separable ones as TOLERANCE allows: a 21 x 21 filter
    in two dimensions takes twenty times as long as a separable one.
    """
    kernel = _trimmed(kernel)
    columns, strengths, rows = np.linalg.svd(kernel)
    rank = _rank(kernel, columns, strengths, rows)
    if rank > 1 and rank * 2 > len(kernel) - 2:  # small or far from separable: directly
        return cv2.filter2D(picture, -1, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101)
    total = None
    for index in range(rank):
        column = (columns[:, index] * strengths[index]).astype(np.float32)
        row = rows[index].astype(np.float32)
        if rank == 1:
            return cv2.sepFilter2D(picture, -1, row, column)
        part = cv2.sepFilter2D(picture, cv2.CV_32F, row, column)
        if total is None:
            total = part
        elif index < rank - 1:
            total = cv2.add(total, part, dst=total)
        else:
            return cv2.add(total, part, dtype=cv2.CV_8U)
    raise AssertionError("unreachable: the last part returns")


def _trimmed(kernel: np.ndarray) -> np.ndarray:
    """Without the outer rings that together weigh less than a tenth of TOLERANCE."""
    size = len(kernel)
    keep = size // 2
    for radius in range(size // 2, 0, -1):
        inner = kernel[size // 2 - radius + 1 : size // 2 + radius, size // 2 - radius + 1 : size // 2 + radius]
        if np.abs(kernel).sum() - np.abs(inner).sum() > TOLERANCE / 10:
            break
        keep = radius - 1
    kernel = kernel[size // 2 - keep : size // 2 + keep + 1, size // 2 - keep : size // 2 + keep + 1]
    return kernel / kernel.sum()


def _rank(kernel: np.ndarray, columns: np.ndarray, strengths: np.ndarray, rows: np.ndarray) -> int:
    for rank in range(1, len(kernel)):
        close = (columns[:, :rank] * strengths[:rank]) @ rows[:rank]
        if np.abs(kernel - close).sum() <= TOLERANCE:
            return rank
    return len(kernel)
