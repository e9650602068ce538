"""Peak signal-to-noise ratio on RGB."""

from __future__ import annotations

import math

from torch import Tensor

from metrics.frame_metric import FrameMetric

#: what an error of zero is reported as, so that one perfect frame keeps a mean finite [ours]
CEILING_DB = 100.0


def psnr_db(mean_squared_error: float, peak: float = 1.0) -> float:
    """10·log10(peak² / MSE) in dB, at most `CEILING_DB`."""
    ratio = mean_squared_error / peak**2
    return min(-10 * math.log10(ratio), CEILING_DB) if ratio > 0 else CEILING_DB


class Psnr(FrameMetric):
    """On RGB in [0, 1], mean over frames; identical frames count as 100 dB."""

    name = "psnr"
    label = "PSNR"
    lower_is_better = False
    needs_reference = True

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        assert reference is not None
        return psnr_db((frame.double() - reference.double()).square().mean().item())
