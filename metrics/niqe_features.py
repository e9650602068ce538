"""The 36 numbers NIQE takes from each block of an image: 18 on the image, 18 on its half-size copy.

All blocks of an image are fitted at once: an asymmetric generalised Gaussian (AGGD) needs only means over
the block and a look-up, so a block costs no loop.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d
from scipy.special import gamma

from common.errors import UserError

FEATURES = 36
#: share of an image's sharpest block that a block must exceed to be learnt from [NIQE]
OFFICIAL_SHARPNESS = 0.75

_Array = NDArray[np.float64]

# ρ(α) = Γ(2/α)² / (Γ(1/α)·Γ(3/α)) grows with α: moment matching is a search in this table (the authors' grid)
_ALPHAS = np.arange(0.2, 10.001, 0.001)
_RATIOS = gamma(2 / _ALPHAS) ** 2 / (gamma(1 / _ALPHAS) * gamma(3 / _ALPHAS))

# neighbours whose products are modelled: right, below and both diagonals
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))


def block_features(plane: _Array, block: int) -> _Array:
    """Features of the non-overlapping blocks of a luma plane.

    Args:
        plane: (H, W) in [0, 255]; the right and lower rest that fills no block is left out.
        block: side of a block in px, even.

    Returns:
        (blocks, 36); a row with NaN belongs to a block without contrast.

    Raises:
        UserError: the plane is smaller than one block.
    """
    features, _ = _features_and_sharpness(plane, block)
    return features


def sharp_block_features(plane: _Array, block: int, threshold: float = OFFICIAL_SHARPNESS) -> _Array:
    """Features of the blocks whose mean local deviation exceeds `threshold` of the image's sharpest block:
    those the authors' prior is fitted on."""
    features, sharpness = _features_and_sharpness(plane, block)
    return features[sharpness > threshold * sharpness.max()]


def _features_and_sharpness(plane: _Array, block: int) -> tuple[_Array, _Array]:
    if block < 16 or block % 2:
        raise UserError(f"the NIQE block of {block} px must be even and at least 16")
    rows, columns = plane.shape[0] // block, plane.shape[1] // block
    if not rows or not columns:
        height, width = plane.shape
        raise UserError(f"frames of {width}×{height} are smaller than the NIQE block of {block} px")
    plane = plane[: rows * block, : columns * block]
    normalised, deviation = _normalise(plane)
    sharpness = _blocks(deviation, block).mean(axis=(1, 2))
    half, _ = _normalise(_halve(plane))
    pair = [_scale_features(_blocks(normalised, block)), _scale_features(_blocks(half, block // 2))]
    return np.concatenate(pair, axis=1), sharpness


def _normalise(plane: _Array) -> tuple[_Array, _Array]:
    """Mean-subtracted, contrast-normalised plane and the local deviation, with a 7×7 window of σ = 7/6."""
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    kernel /= kernel.sum()

    def window(x: _Array) -> _Array:
        return correlate1d(correlate1d(x, kernel, axis=0, mode="nearest"), kernel, axis=1, mode="nearest")

    mean = window(plane)
    deviation = np.sqrt(np.abs(window(plane * plane) - mean * mean))
    return (plane - mean) / (deviation + 1), deviation


def _halve(plane: _Array) -> _Array:
    """Half size by antialiased bicubic with mirrored borders, as MATLAB's imresize; even sizes."""
    distance = np.abs(np.arange(-3, 5) - 0.5) / 2
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    kernel = np.where(distance <= 1, near, far)
    kernel /= kernel.sum()
    # output i sits between inputs 2i and 2i + 1: an eight-tap window whose fourth tap lies on 2i
    rows = correlate1d(plane, kernel, axis=0, mode="reflect", origin=-1)[::2]
    return correlate1d(rows, kernel, axis=1, mode="reflect", origin=-1)[:, ::2]


def _blocks(plane: _Array, block: int) -> _Array:
    """(H, W) cut into (blocks, block, block)."""
    rows, columns = plane.shape[0] // block, plane.shape[1] // block
    return plane.reshape(rows, block, columns, block).swapaxes(1, 2).reshape(-1, block, block)


def _scale_features(blocks: _Array) -> _Array:
    """(blocks, b, b) normalised values -> (blocks, 18)."""
    alpha, left, right = _fit_aggd(blocks)
    columns = [alpha, (left + right) / 2]
    for shift in _SHIFTS:
        alpha, left, right = _fit_aggd(blocks * np.roll(blocks, shift, axis=(1, 2)))
        mean = (right - left) * gamma(2 / alpha) / gamma(1 / alpha)
        columns += [alpha, mean, left, right]
    return np.stack(columns, axis=1)


def _fit_aggd(blocks: _Array) -> tuple[_Array, _Array, _Array]:
    """Moment-matched shape α and the scales β of the left and right half, each (blocks,)."""
    values = blocks.reshape(len(blocks), -1)
    squares = values * values
    negative, positive = values < 0, values > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.sqrt((squares * negative).sum(axis=1) / negative.sum(axis=1))
        right = np.sqrt((squares * positive).sum(axis=1) / positive.sum(axis=1))
        skew = left / right
        ratio = np.abs(values).mean(axis=1) ** 2 / squares.mean(axis=1)
        ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    alpha = _ALPHAS[_nearest(ratio)]
    scale = np.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return alpha, left * scale, right * scale


def _nearest(ratio: _Array) -> NDArray[np.intp]:
    above = np.clip(np.searchsorted(_RATIOS, ratio), 1, len(_RATIOS) - 1)
    return above - (ratio - _RATIOS[above - 1] < _RATIOS[above] - ratio)
