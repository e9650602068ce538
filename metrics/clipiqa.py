"""CLIP-IQA with the RN50 CLIP (Wang et al., "Exploring CLIP for Assessing the Look and Feel of Images",
2023), by pyiqa (PolyForm Noncommercial, hence an optional extra)."""

from __future__ import annotations

from torch import Tensor

from metrics.frame_metric import FrameMetric, MetricSettings
from metrics.weights import find_weights, missing_package

_FILE = "RN50.pt"
_SOURCE = "the RN50 link of https://github.com/openai/CLIP (clip/clip.py)"


class ClipIqa(FrameMetric):
    """CLIP-IQA in 0…1, mean over frames."""

    name = "clipiqa"
    label = "CLIP-IQA"
    lower_is_better = False
    needs_reference = False
    needs_weights = True

    def __init__(self, settings: MetricSettings | None = None) -> None:
        super().__init__(settings)
        try:
            from pyiqa.archs.clipiqa_arch import CLIPIQA
        except ImportError as error:
            raise missing_package(self.name, "pyiqa", error, _FILE, _SOURCE) from None
        path = find_weights(self.name, _FILE, _SOURCE, self.settings.weights)
        # pyiqa takes a path for the backbone's name; OpenAI's file is a TorchScript archive, not a pickle
        network = CLIPIQA(backbone=str(path))
        self._network = network.requires_grad_(False).eval().to(self.settings.device)

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        return float(self._network(frame[None].to(self.settings.device)).item())
