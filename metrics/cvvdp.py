"""ColorVideoVDP (Mantiuk et al., "ColorVideoVDP: A visual difference predictor for image, video, and display
distortions", SIGGRAPH 2024), by its authors' package `cvvdp`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from metrics.frame_metric import Metric, MetricSettings, check_video

#: a display whose shape decides the visual angle of a pixel; the package's default
DISPLAY = "standard_4k"
FRAMES_PER_SECOND = 25


class Cvvdp(Metric):
    """Just-objectionable differences: 10 is indistinguishable from the reference."""

    name = "cvvdp"
    label = "CVVDP"
    lower_is_better = False
    needs_reference = True

    def __init__(self, settings: MetricSettings | None = None) -> None:
        super().__init__(settings)
        try:
            package: Any = importlib.import_module("pycvvdp")
        except ImportError as error:
            raise UserError(
                f"cvvdp needs the package cvvdp ({error}; pip install --no-deps cvvdp OpenEXR pyexr)"
            ) from None
        self._metric = package.cvvdp(display_name=DISPLAY, quiet=True, device=torch.device(self.settings.device))

    @torch.inference_mode()
    def __call__(self, video: Tensor, reference: Tensor | None = None) -> float:
        assert reference is not None
        clips = (check_video(video), check_video(reference))
        score, _ = self._metric.predict(*clips, dim_order="FCHW", frames_per_second=FRAMES_PER_SECOND)
        return float(score)
