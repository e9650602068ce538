"""Perceptual hash of a frame, by which duplicate windows are found: 64 bits of its lowest DCT frequencies.

The hash survives re-encoding, scaling and a change of brightness, as these leave the large shapes of a frame alone.
Method: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010 (pHash), with the DC
coefficient left out. benchmarks/duplicate_table.py measures it.
"""

from __future__ import annotations

import numpy as np

#: side of the thumbnail, px
THUMBNAIL = 32
#: side of the block of lowest frequencies
BLOCK = 8
#: standard deviation of what the block describes, in grey levels, below which a frame has no structure: of 291,840
#: pairs of different photographs and drawings, none above it is nearer than 13 bits (7: one is) [ours]
MIN_DEVIATION = 8.0
#: median distance of the coefficients from their median, in grey levels of 32 x 32 orthonormal coefficients: below it
#: half of the bits are rounding, as in a plain gradient [ours]
MIN_SPREAD = 0.1


def _dct_basis() -> np.ndarray:
    """The first `BLOCK` rows of the orthonormal DCT-II of `THUMBNAIL` values, float64 (8, 32)."""
    frequency, position = np.arange(BLOCK)[:, None], np.arange(THUMBNAIL)[None]
    basis = np.cos(np.pi * frequency * (2 * position + 1) / (2 * THUMBNAIL)) * np.sqrt(2 / THUMBNAIL)
    basis[0] = np.sqrt(1 / THUMBNAIL)
    return basis


_BASIS = _dct_basis()


def perceptual_hash(thumbnail: np.ndarray) -> int | None:
    """Is each of the lowest frequencies above their median?

    Args:
        thumbnail: luma, uint8 (32, 32), 0...255.

    Returns:
        64 bits, row by row of the 8 x 8 block, the highest bit first; that of DC is 0. None for a frame without
        structure, about which the hash would say nothing.
    """
    block = _BASIS @ thumbnail.astype(np.float64) @ _BASIS.T / THUMBNAIL
    coefficients = block.reshape(-1)[1:]
    middle = np.median(coefficients)
    if np.sqrt(np.sum(coefficients**2)) < MIN_DEVIATION or np.median(np.abs(coefficients - middle)) < MIN_SPREAD:
        return None
    return int.from_bytes(np.packbits(np.concatenate(([False], coefficients > middle))).tobytes(), "big")
