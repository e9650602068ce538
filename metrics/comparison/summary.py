"""Means, intervals, paired differences and marks of methods on sets, from one score per clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from metrics.bootstrap import Estimate, estimate
from metrics.frame_metric import Metric

#: best: better than the second best beyond chance; tied: best, but not beyond chance
Mark = Literal["best", "tied", "second", ""]


@dataclass(frozen=True)
class Row:
    """One metric on one set: what each method reaches.

    Attributes:
        values: by method, one number per clip, clips in the same order.
    """

    set_name: str
    metric: type[Metric]
    values: dict[str, NDArray[np.float64]]

    @property
    def clips(self) -> int:
        return len(next(iter(self.values.values())))

    def mean(self, method: str) -> Estimate:
        """Mean over clips and its interval."""
        return estimate(self.values[method])

    def difference(self, method: str, other: str) -> Estimate:
        """Mean of `method` - `other` over clips and its interval, paired by clip."""
        return estimate(self.values[method] - self.values[other])

    def marks(self) -> dict[str, Mark]:
        """Best and second best mean. Equal means come in the order of the methods."""
        sign = 1 if self.metric.lower_is_better else -1
        order = sorted(self.values, key=lambda method: sign * self.values[method].mean())
        marks: dict[str, Mark] = dict.fromkeys(self.values, "")
        if len(order) > 1:
            marks[order[0]] = "best" if self.difference(order[0], order[1]).excludes_zero else "tied"
            marks[order[1]] = "second"
        return marks
