"""Grid: does a result print the squares of its codec or of its patches?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metrics.frame_metric import FrameMetric
from metrics.luma import luma

#: px: the VAE's stride, and the stride of the DiT's patches of two latents
PERIODS = (8, 16)


class Grid(FrameMetric):
    """Energy of neighbouring differences across the borders of 8 and 16 px over that elsewhere, divided by the same
    ratio of the reference; the larger of both periods, mean over frames [ours].

    1: as much as the reference has by chance; more: squares.
    """

    name = "grid"
    label = "Grid"
    lower_is_better = True
    needs_reference = True

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        assert reference is not None
        mine, theirs = luma(frame), luma(reference)
        return max(border_energy(mine, period) / border_energy(theirs, period) for period in PERIODS)


def border_energy(plane: NDArray[np.float64], period: int) -> float:
    """Mean squared difference of neighbours across multiples of `period` over that of all other neighbours."""
    on_border, elsewhere = [], []
    for axis in (0, 1):
        squared = np.square(np.diff(plane, axis=axis))
        border = np.arange(1, plane.shape[axis]) % period == 0
        on_border.append(np.compress(border, squared, axis=axis).ravel())
        elsewhere.append(np.compress(~border, squared, axis=axis).ravel())
    # A flat frame has no grid.
    floor = 1e-6
    return float((np.concatenate(on_border).mean() + floor) / (np.concatenate(elsewhere).mean() + floor))
