"""LPIPS with AlexNet (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
2018).

The calibrated heads ship in the package `lpips`; the AlexNet backbone is torchvision's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from metrics.frame_metric import FrameMetric
from metrics.weights import WeightedMetric, find_weights, load_state_dict

_SOURCE = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


class Lpips(WeightedMetric, FrameMetric):
    """LPIPS v0.1 (AlexNet) on RGB, mean over frames; 0 for identical frames."""

    name = "lpips"
    label = "LPIPS"
    lower_is_better = True
    needs_reference = True
    packages = ("lpips",)
    package, module = "lpips", "lpips"
    file = "alexnet-owt-7be5be79.pth"
    source = _SOURCE

    def load(self, module: Any, path: Path) -> None:
        network = lpips_network()
        _fill_backbone(network.net, load_state_dict(path), str(path))
        self._network = self.ready(network)

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        assert reference is not None
        return self.frames(frame[None], reference[None])[0]

    def frames(self, frames: Tensor, reference: Tensor | None = None) -> list[float]:  # type: ignore[override]
        assert reference is not None
        pair = (images.to(self.settings.device) for images in (frames, reference))
        return [float(value) for value in self._network(*pair, normalize=True).flatten().tolist()]


def lpips_network() -> Any:
    """LPIPS (AlexNet) with its calibrated heads and a random backbone.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import lpips
    except ImportError as error:
        raise UserError(f"LPIPS needs the package lpips ({error}): pip install lpips") from None
    # pnet_rand builds the backbone without a download; its weights follow from the local file
    return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)


def fill_lpips(network: Any) -> None:
    """Give the backbone its published weights.

    Raises:
        UserError: their file is not there.
    """
    path = find_weights(Lpips.name, Lpips.file, Lpips.source)
    _fill_backbone(network.net, load_state_dict(path), str(path))


def _fill_backbone(backbone: torch.nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy torchvision's `features.<i>.*` into lpips' `slice<j>.<i>.*`."""
    for name in backbone.state_dict():
        layer = name.split(".", 1)[1]
        if f"features.{layer}" not in state:
            raise UserError(f"{where} holds no features.{layer}: not torchvision's AlexNet; get it from {_SOURCE}")
    backbone.load_state_dict({n: state[f"features.{n.split('.', 1)[1]}"] for n in backbone.state_dict()})
