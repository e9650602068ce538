"""DISTS (Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity", 2020).

Channel means (texture) and covariances (structure) of VGG16's stages are compared and weighed. The weights are the
authors', inside their package DISTS_pytorch (MIT), which need not be importable; VGG16 is torchvision's file. Frames
are not resized, as in pyiqa; the authors' demo shrinks them to 256 px first.
"""

from __future__ import annotations

import importlib.metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from common.errors import UserError
from metrics.frame_metric import FrameMetric, MetricSettings
from metrics.weights import find_weights, load_state_dict

_VGG = "vgg16-397923af.pth"
_VGG_SOURCE = "https://download.pytorch.org/models/vgg16-397923af.pth"
_HEADS = "dists_weights.pt"
_HEADS_SOURCE = "weights.pt of the package dists-pytorch (pip install --no-deps dists-pytorch finds it there; MIT)"
#: torchvision's layers behind which a stage ends; the max-pooling after it is replaced by a smooth one
_STAGES = (-1, 3, 8, 15, 22, 29)
_CHANNELS = (3, 64, 128, 256, 512, 512)
_STABILISER = 1e-6

_MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
_DEVIATION = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)


class Dists(FrameMetric):
    """DISTS on RGB, mean over frames; 0 for identical frames."""

    name = "dists"
    label = "DISTS"
    lower_is_better = True
    needs_reference = True
    needs_weights = True

    def __init__(self, settings: MetricSettings | None = None) -> None:
        super().__init__(settings)
        from torchvision.models import vgg16

        self.files = [find_weights(self.name, _VGG, _VGG_SOURCE, self.settings.weights), self._heads()]
        state, heads = (load_state_dict(file) for file in self.files)
        with torch.device("meta"):  # without memory for the classifier, which is not needed
            layers = vgg16(weights=None).features
        try:
            layers.load_state_dict({name: state[f"features.{name}"] for name in layers.state_dict()}, assign=True)
            self._weights = torch.stack([heads["alpha"].flatten(), heads["beta"].flatten()]).to(self.settings.device)
            self._weights = (self._weights / self._weights.sum()).split(_CHANNELS, dim=1)
        except (RuntimeError, KeyError) as error:
            what = type(error).__name__
            raise UserError(f"{' or '.join(map(str, self.files))} is no weight file of DISTS ({what})") from None
        self._layers = layers.requires_grad_(False).eval().to(self.settings.device)

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        assert reference is not None
        similar = torch.zeros((), device=self.settings.device)
        for x, y, (alpha, beta) in zip(self.stages(frame), self.stages(reference), self._weights, strict=True):
            mean_x, mean_y = x.mean(dim=(2, 3)), y.mean(dim=(2, 3))
            covariance = (x * y).mean(dim=(2, 3)) - mean_x * mean_y
            spread = x.var(dim=(2, 3), correction=0) + y.var(dim=(2, 3), correction=0)
            texture = (2 * mean_x * mean_y + _STABILISER) / (mean_x**2 + mean_y**2 + _STABILISER)
            similar += (alpha * texture + beta * (2 * covariance + _STABILISER) / (spread + _STABILISER)).sum()
        return 1 - similar.item()

    def stages(self, frame: Tensor) -> list[Tensor]:
        """The frame itself and VGG16's five stages, each (1, C, h, w)."""
        x = frame[None].to(self.settings.device)
        found = [x]
        x = (x - _MEAN.to(x)) / _DEVIATION.to(x)
        for before, last in pairwise(_STAGES):
            if before >= 0:
                x = smooth_half(x)
            for layer in self._layers[before + 1 + (before >= 0) : last + 1]:
                x = layer(x)
            found.append(x)
        return found

    def _heads(self) -> Path:
        try:
            for file in importlib.metadata.files("dists-pytorch") or []:
                if file.name == "weights.pt":
                    return Path(str(file.locate()))
        except importlib.metadata.PackageNotFoundError:
            pass
        return find_weights(self.name, _HEADS, _HEADS_SOURCE, self.settings.weights)


def smooth_half(x: Tensor) -> Tensor:
    """Half size by the square root of a Hann-weighted mean of squares (3×3, stride 2)."""
    window = torch.from_numpy(np.hanning(5)[1:-1]).to(x)
    kernel = torch.outer(window, window) / window.sum() ** 2
    squares = functional.conv2d(x**2, kernel.expand(x.shape[1], 1, 3, 3), stride=2, padding=1, groups=x.shape[1])
    return (squares + 1e-12).sqrt()
