"""PSNR from a mean squared error. Free of torch, which processes that only decode and degrade do not load."""

from __future__ import annotations

import math

#: what an error of zero is reported as, so that one perfect frame keeps a mean finite [ours]
CEILING_DB = 100.0


def psnr_db(mean_squared_error: float, peak: float = 1.0) -> float:
    """10·log10(peak² / MSE) in dB, at most `CEILING_DB`."""
    ratio = mean_squared_error / peak**2
    return min(-10 * math.log10(ratio), CEILING_DB) if ratio > 0 else CEILING_DB
