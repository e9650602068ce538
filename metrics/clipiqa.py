"""CLIP-IQA with the RN50 CLIP (Wang et al., "Exploring CLIP for Assessing the Look and Feel of Images",
2023), by pyiqa (PolyForm Noncommercial, hence an optional extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from metrics.frame_metric import FrameMetric
from metrics.weights import WeightedMetric


class ClipIqa(WeightedMetric, FrameMetric):
    """CLIP-IQA in 0…1, mean over frames."""

    name = "clipiqa"
    label = "CLIP-IQA"
    lower_is_better = False
    needs_reference = False
    packages = ("pyiqa",)
    package, module = "pyiqa", "pyiqa.archs.clipiqa_arch"
    file = "RN50.pt"
    source = "the RN50 link of https://github.com/openai/CLIP (clip/clip.py)"

    def load(self, module: Any, path: Path) -> None:
        # pyiqa takes a path for the backbone's name; OpenAI's file is a TorchScript archive, not a pickle
        self._network = self.ready(module.CLIPIQA(backbone=str(path)))

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        return float(self._network(frame[None].to(self.settings.device)).item())
