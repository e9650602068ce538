"""DOVER, a video's technical and aesthetic quality fused (Wu et al., "Exploring Video Quality Assessment on
User Generated Contents from Aesthetic and Technical Perspectives", 2023).

The authors' code is for non-commercial use and is not part of this repository. Their own export to ONNX holds
the whole network; the two views it looks at and the fusion of its two heads are made here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from metrics.frame_metric import check_video
from metrics.weights import WeightedMetric

_CLIP_FRAMES = 32
_FRAME_STEP = 2
_TECHNICAL_CLIPS = 3
_GRID = 7
_FRAGMENT = 32
_SIDE = _GRID * _FRAGMENT

_MEAN = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1, 1)
_DEVIATION = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1, 1)


class Dover(WeightedMetric):
    """Fused DOVER score in 0…100. Fragments are drawn with a fixed seed: equal clips get equal scores."""

    name = "dover"
    label = "DOVER"
    lower_is_better = False
    needs_reference = False
    package, module = "onnxruntime", "onnxruntime"
    file = "onnx_dover.onnx"
    source = "convert_to_onnx.py of https://github.com/VQAssessment/DOVER, run on its DOVER.pth"

    def load(self, module: Any, path: Path) -> None:
        wanted = ["CUDAExecutionProvider"] if self.settings.device.startswith("cuda") else []
        providers = [name for name in wanted if name in module.get_available_providers()]
        try:
            self._session = module.InferenceSession(str(path), providers=[*providers, "CPUExecutionProvider"])
            inputs = {entry.name: entry.shape for entry in self._session.get_inputs()}
            declared = inputs["tech_view"][0]
        except Exception as error:
            raise UserError(f"{path} is not DOVER's ONNX export ({type(error).__name__}); make it again") from None
        # the authors' script exports a fixed batch of four, their protocol scores three clips
        self._batch = declared if isinstance(declared, int) else _TECHNICAL_CLIPS

    def __call__(self, video: Tensor, reference: Tensor | None = None) -> float:
        frames = check_video(video).cpu().transpose(0, 1).float() * 255
        generator = np.random.default_rng(0)
        aesthetic = aesthetic_view(frames, generator)
        technical = technical_view(frames, generator)
        filled = np.resize(technical, (self._batch, *technical.shape[1:]))
        views = {"aes_view": aesthetic, "tech_view": filled}
        scores_a, scores_t = (np.asarray(output) for output in self._session.run(None, views))
        return fuse(float(scores_t[: len(technical)].mean()), float(scores_a.mean()))


def fuse(technical: float, aesthetic: float) -> float:
    """100·σ(0.6104·(t - 0.1107)/0.07355 + 0.3896·(a + 0.08285)/0.03774)."""
    x = 0.6104 * (technical - 0.1107) / 0.07355 + 0.3896 * (aesthetic + 0.08285) / 0.03774
    return 100 / (1 + math.exp(-x))


def aesthetic_view(frames: Tensor, generator: np.random.Generator) -> NDArray[np.float32]:
    """One frame from each of 32 stretches, the whole picture at 224×224: (1, 3, 32, 224, 224), normalised.

    Args:
        frames: (3, F, H, W) in [0, 255].
    """
    chosen = frames[:, frame_indices(frames.shape[1], _CLIP_FRAMES, 1, generator)]
    small = functional.interpolate(
        chosen.transpose(0, 1), size=(_SIDE, _SIDE), mode="bilinear", antialias=True
    ).transpose(0, 1)
    return _normalised(small)[None]


def technical_view(frames: Tensor, generator: np.random.Generator) -> NDArray[np.float32]:
    """Three clips of 32 frames made of 7×7 fragments at full resolution: (3, 3, 32, 224, 224), normalised."""
    indices = frame_indices(frames.shape[1], _TECHNICAL_CLIPS, _CLIP_FRAMES, generator)
    clips = [_normalised(fragments(frames[:, part], generator)) for part in np.split(indices, _TECHNICAL_CLIPS)]
    return np.stack(clips)


def frame_indices(frames: int, stretches: int, length: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """`length` frames, every second one, from a random place in each of `stretches` equal parts of a clip; a
    clip that is too short starts over."""
    stretch = frames // stretches
    slack = stretch - length * _FRAME_STEP
    starts = np.arange(stretches) * stretch
    if slack > 0:
        starts = starts + generator.integers(0, slack, stretches)
    return ((starts[:, None] + np.arange(length) * _FRAME_STEP) % frames).reshape(-1)


def fragments(clip: Tensor, generator: np.random.Generator) -> Tensor:
    """One 32 px square, the same in all frames, from each cell of a 7×7 grid, side by side: (3, F, 224, 224).
    Smaller pictures are enlarged first."""
    ratio = min(clip.shape[2:]) / _SIDE
    if ratio < 1:
        clip = functional.interpolate(clip.transpose(0, 1), scale_factor=1 / ratio, mode="bilinear").transpose(0, 1)
    height, width = clip.shape[2:]
    rows = []
    for row in range(_GRID):
        cells = []
        for column in range(_GRID):
            top = _place(row, height, generator)
            left = _place(column, width, generator)
            cells.append(clip[..., top : top + _FRAGMENT, left : left + _FRAGMENT])
        rows.append(torch.cat(cells, dim=-1))
    return torch.cat(rows, dim=-2)


def _place(index: int, size: int, generator: np.random.Generator) -> int:
    cell = size // _GRID
    slack = cell - _FRAGMENT
    jitter = int(generator.integers(0, slack)) if slack > 0 else 0
    return min(cell * index, size - _FRAGMENT) + jitter


def _normalised(frames: Tensor) -> NDArray[np.float32]:
    return ((frames - _MEAN) / _DEVIATION).numpy()
