"""95 % intervals of a mean over clips: percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap",
1993, chapter 13). Clips are drawn, not frames: frames of one clip are no independent samples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
#: quantiles of a 95 % interval
LOW, HIGH = 0.025, 0.975


class Estimate(NamedTuple):
    """A mean over clips and its interval; None where one clip tells nothing about others."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Quantiles of the means of resampled `values` (clips,)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    return float(np.quantile(means, LOW)), float(np.quantile(means, HIGH))


def estimate(values: NDArray[np.float64]) -> Estimate:
    """Mean and interval of one number per clip. Give differences of the same clips for a paired comparison."""
    low, high = interval(values) if len(values) > 1 else (None, None)
    return Estimate(float(values.mean()), low, high)
