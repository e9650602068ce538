"""MUSIQ trained on KonIQ-10k (Ke et al., "MUSIQ: Multi-scale Image Quality Transformer", 2021), by pyiqa.

pyiqa is PolyForm Noncommercial, hence an optional extra. Its network is built without weights and filled
here, so that nothing is downloaded or unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from metrics.frame_metric import FrameMetric
from metrics.weights import WeightedMetric, load_state_dict


class Musiq(WeightedMetric, FrameMetric):
    """MUSIQ in about 0…100, mean over frames."""

    name = "musiq"
    label = "MUSIQ"
    lower_is_better = False
    needs_reference = False
    packages = ("pyiqa",)
    package, module = "pyiqa", "pyiqa.archs.musiq_arch"
    file = "musiq_koniq_ckpt-e95806b9.pth"
    source = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights"

    def load(self, module: Any, path: Path) -> None:
        network = module.MUSIQ(pretrained=False)
        network.load_state_dict(load_state_dict(path))
        self._network = self.ready(network)

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        return self.frames(frame[None])[0]

    def frames(self, frames: Tensor, reference: Tensor | None = None) -> list[float]:  # type: ignore[override]
        return [float(value) for value in self._network(frames.to(self.settings.device)).flatten().tolist()]
