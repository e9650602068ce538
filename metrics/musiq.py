"""MUSIQ trained on KonIQ-10k (Ke et al., "MUSIQ: Multi-scale Image Quality Transformer", 2021), by pyiqa.

pyiqa is PolyForm Noncommercial, hence an optional extra. Its network is built without weights and filled
here, so that nothing is downloaded or unpickled.
"""

from __future__ import annotations

from torch import Tensor

from metrics.frame_metric import FrameMetric, MetricSettings
from metrics.weights import find_weights, load_state_dict, missing_package

_FILE = "musiq_koniq_ckpt-e95806b9.pth"
_SOURCE = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights"


class Musiq(FrameMetric):
    """MUSIQ in about 0…100, mean over frames."""

    name = "musiq"
    label = "MUSIQ"
    lower_is_better = False
    needs_reference = False
    needs_weights = True

    def __init__(self, settings: MetricSettings | None = None) -> None:
        super().__init__(settings)
        try:
            from pyiqa.archs.musiq_arch import MUSIQ
        except ImportError as error:
            raise missing_package(self.name, "pyiqa", error, _FILE, _SOURCE) from None
        path = find_weights(self.name, _FILE, _SOURCE, self.settings.weights)
        network = MUSIQ(pretrained=False)
        network.load_state_dict(load_state_dict(path))
        self._network = network.requires_grad_(False).eval().to(self.settings.device)

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        return float(self._network(frame[None].to(self.settings.device)).item())
