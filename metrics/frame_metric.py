"""What a quality metric is: `Metric`, one number for one clip; `FrameMetric`, the mean of a number per frame.

A metric takes a clip frame by frame, so that a clip's length does not show in memory: `start` gives a `Scorer`, which
is fed by `add` and closed by `finish`. All metrics of a clip share one pass over its frames.

A metric is one file: a class with its direction and its need of a reference, nowhere else written down. One from
outside the repository is named `package.module:Class` (docs/extending.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError


@dataclass(frozen=True)
class MetricSettings:
    """What some metrics need to know beside the clip.

    Attributes:
        weights: folder searched first for weight files (metrics/weights.py names the others).
        niqe_model: file written by `python -m metrics.fit_niqe`; needed by `niqe_fitted` alone.
        device: where networks run; the formulas run on the CPU.
        frames_per_forward: of networks that take several, where a clip is there at once.
    """

    weights: Path | None = None
    niqe_model: Path | None = None
    device: str = "cpu"
    frames_per_forward: int = 1


class ClipSize(NamedTuple):
    """Length in frames, height and width in px."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}×{self.height}"


class Scorer(ABC):
    """A metric at work on one clip. Frames are float32 (3, H, W) RGB in [0, 1], in order."""

    #: frames, or pairs of frames, that had nothing to measure and do not count in the score
    left_out = 0

    @abstractmethod
    def add(self, frame: Tensor, reference: Tensor | None = None) -> None:
        """The next frame; `reference` is there if the metric needs it."""

    @abstractmethod
    def finish(self) -> float:
        """The score, after the last frame.

        Raises:
            UserError: the clip cannot be scored.
        """

    def close(self) -> None:  # noqa: B027  most metrics hold nothing
        """Let go of programs and files, finished or not."""


class Metric(ABC):
    """One number for one clip."""

    #: key in result files
    name: ClassVar[str]
    #: heading in tables
    label: ClassVar[str]
    #: direction of improvement
    lower_is_better: ClassVar[bool]
    #: whether the HR clip must be given
    needs_reference: ClassVar[bool]
    #: whether it needs weights that have to be downloaded
    needs_weights: ClassVar[bool] = False
    #: raised when scores of the same frames change; kept scores of another version are not used
    version: ClassVar[int] = 1
    #: Python packages whose version is told with the scores
    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: MetricSettings | None = None) -> None:
        """
        Raises:
            UserError: a package or a weight file is missing; the message gives the remedy.
        """
        self.settings = settings or MetricSettings()
        #: weight files in use
        self.files: list[Path] = []

    @abstractmethod
    def start(self, size: ClipSize) -> Scorer:
        """A scorer for one clip of this size.

        Raises:
            UserError: the metric cannot score this size.
        """

    def __call__(self, video: Tensor, reference: Tensor | None = None) -> float:
        """Score `video`, float32 (F, 3, H, W) RGB in [0, 1]; `reference` has the same shape and range."""
        targets: Tensor | list[None] = [None] * len(video)
        if self.needs_reference:
            video, targets = check_pair(video, reference)
        frames, _, height, width = check_video(video).shape
        with torch.inference_mode(), closing(self.start(ClipSize(frames, height, width))) as scorer:
            for frame, target in zip(video, targets, strict=True):
                scorer.add(frame, target)
            return scorer.finish()


class FrameMetric(Metric):
    """The mean over frames of `frame`."""

    def start(self, size: ClipSize) -> Scorer:
        return _MeanScorer(self)

    @abstractmethod
    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float | None:
        """Score one frame, (3, H, W); `reference` is there if `needs_reference`. None: nothing to measure."""

    def frames(self, frames: Tensor, reference: Tensor | None = None) -> list[float | None]:
        """`frame` of each of (N, 3, H, W); networks take them in one forward pass."""
        targets: Tensor | list[None] = [None] * len(frames) if reference is None else reference
        return [self.frame(frame, target) for frame, target in zip(frames, targets, strict=True)]

    def __call__(self, video: Tensor, reference: Tensor | None = None) -> float:
        if self.needs_reference:
            video, reference = check_pair(video, reference)
        scorer, many = _MeanScorer(self), self.settings.frames_per_forward
        with torch.inference_mode():
            for first in range(0, len(check_video(video)), many):
                part = slice(first, first + many)
                target = reference[part] if self.needs_reference and reference is not None else None
                for value in self.frames(video[part], target):
                    scorer.count(value)
        return scorer.finish()


class _MeanScorer(Scorer):
    def __init__(self, metric: FrameMetric) -> None:
        self._metric = metric
        self._values: list[float] = []

    def add(self, frame: Tensor, reference: Tensor | None = None) -> None:
        self.count(self._metric.frame(frame, reference))

    def count(self, value: float | None) -> None:
        """Take one frame's score into the mean."""
        if value is None:
            self.left_out += 1
        else:
            self._values.append(value)

    def finish(self) -> float:
        if not self._values:
            raise UserError(f"{self._metric.name} finds nothing to measure in any of {self.left_out} frames: all flat?")
        return sum(self._values) / len(self._values)


def check_video(video: Tensor, what: str = "video") -> Tensor:
    """`video` itself if it is float (F, 3, H, W); a ValueError for the programmer otherwise."""
    if video.ndim != 4 or video.shape[1] != 3 or not torch.is_floating_point(video):
        raise ValueError(f"{what} must be float (F, 3, H, W) in [0, 1], not {video.dtype} {tuple(video.shape)}")
    return video


def check_pair(video: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """Video and reference of one shape; a ValueError for the programmer otherwise."""
    if reference is None:
        raise ValueError("this metric needs a reference")
    if video.shape != reference.shape:
        raise ValueError(f"video {tuple(video.shape)} and reference {tuple(reference.shape)} differ in shape")
    return check_video(video), check_video(reference, "reference")
