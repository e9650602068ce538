"""Peak signal-to-noise ratio on RGB."""

from __future__ import annotations

from torch import Tensor

from metrics.decibel import psnr_db
from metrics.frame_metric import FrameMetric


class Psnr(FrameMetric):
    """On RGB in [0, 1], mean over frames; identical frames count as 100 dB."""

    name = "psnr"
    label = "PSNR"
    lower_is_better = False
    needs_reference = True

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        assert reference is not None
        return psnr_db((frame.double() - reference.double()).square().mean().item())
