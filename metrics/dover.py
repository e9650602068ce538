"""DOVER, a video's technical and aesthetic quality fused (Wu et al., "Exploring Video Quality Assessment on
User Generated Contents from Aesthetic and Technical Perspectives", 2023).

An ONNX file holds the whole network (python -m metrics.convert_dover, or the authors' own export); the two views it
looks at and the fusion of its two heads are made here. The views hold 32 and 96 frames of 224×224, however long the
clip is.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from metrics.frame_metric import ClipSize, Scorer
from metrics.weights import WeightedMetric

_CLIP_FRAMES = 32
_FRAME_STEP = 2
_TECHNICAL_CLIPS = 3
_GRID = 7
_FRAGMENT = 32
_SIDE = _GRID * _FRAGMENT

_MEAN = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)
_DEVIATION = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1)


class Dover(WeightedMetric):
    """Fused DOVER score in 0…100. Fragments are drawn with a fixed seed: equal clips get equal scores.

    The aesthetic view is resized without antialiasing, as the network was trained.
    """

    name = "dover"
    label = "DOVER"
    lower_is_better = False
    needs_reference = False
    version = 2  # 1 was antialiased
    packages = ("onnxruntime",)
    package, module = "onnxruntime", "onnxruntime"
    antialias: ClassVar[bool] = False
    file = "onnx_dover.onnx"
    source = "python -m metrics.convert_dover DOVER.pth, with the file of https://github.com/VQAssessment/DOVER"

    def load(self, module: Any, path: Path) -> None:
        wanted = ["CUDAExecutionProvider"] if self.settings.device.startswith("cuda") else []
        providers = [name for name in wanted if name in module.get_available_providers()]
        if wanted and not providers:
            print("dover runs on the CPU: this onnxruntime has no CUDA; install onnxruntime-gpu", file=sys.stderr)
        try:
            self._session = module.InferenceSession(str(path), providers=[*providers, "CPUExecutionProvider"])
            inputs = {entry.name: entry.shape for entry in self._session.get_inputs()}
            declared = inputs["tech_view"][0]
        except Exception as error:
            raise UserError(f"{path} is not DOVER's ONNX export ({type(error).__name__}); make it again") from None
        # the authors' script exports a fixed batch of four, their protocol scores three clips
        self._batch = declared if isinstance(declared, int) else _TECHNICAL_CLIPS

    def start(self, size: ClipSize) -> Scorer:
        return _DoverScorer(self, size)

    def heads(self, aesthetic: NDArray[np.float32], technical: NDArray[np.float32]) -> tuple[float, float]:
        """Technical and aesthetic score of the two views."""
        filled = np.resize(technical, (self._batch, *technical.shape[1:]))
        scores = self._session.run(None, {"aes_view": aesthetic, "tech_view": filled})
        scores_a, scores_t = (np.asarray(output) for output in scores)
        return float(scores_t[: len(technical)].mean()), float(scores_a.mean())


class DoverAntialias(Dover):
    """DOVER as a recent torchvision computes it: the aesthetic view is resized with antialiasing."""

    name = "dover_antialias"
    label = "DOVER (antialias)"
    antialias = True


class _DoverScorer(Scorer):
    def __init__(self, metric: Dover, size: ClipSize) -> None:
        self._metric, self._views = metric, Views(size, antialias=metric.antialias)

    def add(self, frame: Tensor, reference: Tensor | None = None) -> None:
        self._views.add(frame.cpu().float() * 255)

    def finish(self) -> float:
        return fuse(*self._metric.heads(self._views.aesthetic, self._views.technical))


def fuse(technical: float, aesthetic: float) -> float:
    """100·σ(0.6104·(t - 0.1107)/0.07355 + 0.3896·(a + 0.08285)/0.03774)."""
    x = 0.6104 * (technical - 0.1107) / 0.07355 + 0.3896 * (aesthetic + 0.08285) / 0.03774
    return 100 / (1 + math.exp(-x))


class Views:
    """The two views, filled from the frames that they need; the others are passed over. Fixed random seed.

    Attributes:
        aesthetic: float32 (1, 3, 32, 224, 224), normalised: one frame from each of 32 stretches, the whole image.
        technical: float32 (3, 3, 32, 224, 224), normalised: three clips of 7×7 fragments at full resolution.
    """

    def __init__(self, size: ClipSize, *, antialias: bool) -> None:
        self._generator = np.random.default_rng(0)
        self._antialias = antialias
        self._chosen = frame_indices(size.frames, _CLIP_FRAMES, 1, self._generator)
        self._cut = frame_indices(size.frames, _TECHNICAL_CLIPS, _CLIP_FRAMES, self._generator)
        self._cut = self._cut.reshape(_TECHNICAL_CLIPS, _CLIP_FRAMES)
        self._places: list[list[tuple[int, int]]] = []
        self._next = 0
        self.aesthetic = np.zeros((1, 3, _CLIP_FRAMES, _SIDE, _SIDE), np.float32)
        self.technical = np.zeros((_TECHNICAL_CLIPS, 3, _CLIP_FRAMES, _SIDE, _SIDE), np.float32)

    def add(self, frame: Tensor) -> None:
        """The next frame, (3, H, W) in [0, 255]."""
        chosen, cut = np.flatnonzero(self._chosen == self._next), np.argwhere(self._cut == self._next)
        self._next += 1
        if len(chosen):
            self.aesthetic[0][:, chosen] = _normalised(self._resized(frame, size=(_SIDE, _SIDE)))[:, None]
        ratio = min(frame.shape[1:]) / _SIDE
        if ratio < 1 and (len(cut) or not self._places):  # smaller images are enlarged first
            frame = self._resized(frame, scale_factor=1 / ratio)
        if not self._places:
            self._places = [fragment_places(frame.shape[1], frame.shape[2], self._generator) for _ in self._cut]
        for clip, position in cut:
            self.technical[clip][:, position] = _normalised(fragments(frame, self._places[clip]))

    def _resized(self, frame: Tensor, **target: Any) -> Tensor:
        antialias = self._antialias and "size" in target
        return functional.interpolate(frame[None], mode="bilinear", antialias=antialias, **target)[0]


def frame_indices(frames: int, stretches: int, length: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """`length` frames, every second one, from a random place in each of `stretches` equal parts of a clip; a
    clip that is too short starts over."""
    stretch = frames // stretches
    slack = stretch - length * _FRAME_STEP
    starts = np.arange(stretches) * stretch
    if slack > 0:
        starts = starts + generator.integers(0, slack, stretches)
    return ((starts[:, None] + np.arange(length) * _FRAME_STEP) % frames).reshape(-1)


def fragment_places(height: int, width: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Top and left of one 32 px square in each cell of a 7×7 grid, by rows."""
    cells = [(row, column) for row in range(_GRID) for column in range(_GRID)]
    return [(_place(row, height, generator), _place(column, width, generator)) for row, column in cells]


def fragments(frame: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """The squares at `places`, side by side: (3, 224, 224)."""
    squares = [frame[:, top : top + _FRAGMENT, left : left + _FRAGMENT] for top, left in places]
    rows = [torch.cat(squares[start : start + _GRID], dim=-1) for start in range(0, len(squares), _GRID)]
    return torch.cat(rows, dim=-2)


def _place(index: int, size: int, generator: np.random.Generator) -> int:
    cell = size // _GRID
    slack = cell - _FRAGMENT
    jitter = int(generator.integers(0, slack)) if slack > 0 else 0
    return min(cell * index, size - _FRAGMENT) + jitter


def _normalised(frame: Tensor) -> NDArray[np.float32]:
    return ((frame - _MEAN) / _DEVIATION).numpy()
