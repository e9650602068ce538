"""Perceptual hash of a frame, by which duplicate windows are found: 64 bits of its lowest DCT frequencies.

The hash survives re-encoding, scaling and a change of brightness, as these leave the large shapes of a frame alone.
Method: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010 (pHash), with the DC
coefficient left out and the coefficients taken diagonal by diagonal, as JPEG orders them, instead of an 8 x 8 block.
Of 394,240 pairs of clips of different photographs the block calls one duplicates, the diagonals none
(benchmarks/duplicate_table.py).
"""

from __future__ import annotations

import numpy as np

#: side of the thumbnail, px
THUMBNAIL = 32
BITS = 64
#: standard deviation of what the coefficients describe, in grey levels, below which a frame has no structure. Two of 97
#: photographs and drawings are nearer than 13 bits at 7.6 grey levels [ours]
MIN_DEVIATION = 8.0
#: median distance of the coefficients from their median, in grey levels, below which half of the bits are rounding, as
#: in a plain gradient [ours]
MIN_SPREAD = 0.1


#: (vertical, horizontal) frequencies, the lowest `BITS` after DC by their sum
_PLACES = sorted(((y, x) for y in range(BITS) for x in range(BITS)), key=lambda place: (sum(place), place))[
    1 : BITS + 1
]
_ROWS, _COLUMNS = np.array(_PLACES).T


def _dct_basis(rows: int) -> np.ndarray:
    """The first rows of the orthonormal DCT-II of `THUMBNAIL` values, float64 (rows, 32)."""
    frequency, position = np.arange(rows)[:, None], np.arange(THUMBNAIL)[None]
    basis = np.cos(np.pi * frequency * (2 * position + 1) / (2 * THUMBNAIL)) * np.sqrt(2 / THUMBNAIL)
    basis[0] = np.sqrt(1 / THUMBNAIL)
    return basis


_BASIS = _dct_basis(max(_ROWS.max(), _COLUMNS.max()) + 1)


def perceptual_hash(thumbnail: np.ndarray) -> int | None:
    """Is each of the lowest frequencies above their median?

    Args:
        thumbnail: luma, uint8 (32, 32), 0...255.

    Returns:
        64 bits, the lowest frequency first and highest; 32 of them are 1 unless coefficients are equal. None for a
        frame without structure, about which the hash would say nothing.
    """
    # over 32, a coefficient's square is its share of the variance of the pixels
    coefficients = (_BASIS @ thumbnail.astype(np.float64) @ _BASIS.T / THUMBNAIL)[_ROWS, _COLUMNS]
    middle = np.median(coefficients)
    if np.sqrt(np.sum(coefficients**2)) < MIN_DEVIATION or np.median(np.abs(coefficients - middle)) < MIN_SPREAD:
        return None
    return int.from_bytes(np.packbits(coefficients > middle).tobytes(), "big")
