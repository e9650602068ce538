"""Peak signal-to-noise ratio on RGB."""

from __future__ import annotations

import math

from torch import Tensor

from metrics.registry import MetricSettings, check_pair


class Psnr:
    """10·log10(1 / MSE) in dB on RGB in [0, 1], mean over frames; identical frames count as 100 dB."""

    name = "psnr"
    lower_is_better = False
    needs_reference = True
    #: what an error of zero is reported as, so that one perfect frame keeps a clip's mean finite
    ceiling_db = 100.0

    def __init__(self, settings: MetricSettings | None = None) -> None:
        pass

    def __call__(self, video: Tensor, reference: Tensor | None = None) -> float:
        video, reference = check_pair(video, reference)
        values = []
        for frame, target in zip(video, reference, strict=True):
            error = (frame.double() - target.double()).square().mean().item()
            values.append(min(-10 * math.log10(error), self.ceiling_db) if error > 0 else self.ceiling_db)
        return sum(values) / len(values)
