"""What a quality metric is: `Metric`, one number for one clip; `FrameMetric`, the mean of a number per frame.

A metric is one file: a class with its direction and its need of a reference, nowhere else written down. One from
outside the repository is named `package.module:Class` (docs/extending.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class MetricSettings:
    """What some metrics need to know beside the clip.

    Attributes:
        weights: folder searched first for weight files (metrics/weights.py names the others).
        niqe_model: file written by `python -m metrics.fit_niqe`; needed by `niqe_fitted` alone.
        device: where networks run; the formulas run on the CPU.
    """

    weights: Path | None = None
    niqe_model: Path | None = None
    device: str = "cpu"


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

    def __init__(self, settings: MetricSettings | None = None) -> None:
        """
        Raises:
            UserError: a package or a weight file is missing; the message gives the remedy.
        """
        self.settings = settings or MetricSettings()

    @abstractmethod
    def __call__(self, video: Tensor, reference: Tensor | None = None) -> float:
        """Score `video`, float32 (F, 3, H, W) RGB in [0, 1]; `reference` has the same shape and range."""


class FrameMetric(Metric):
    """The mean over frames of `frame`."""

    @torch.inference_mode()
    def __call__(self, video: Tensor, reference: Tensor | None = None) -> float:
        if self.needs_reference:
            pairs = zip(*check_pair(video, reference), strict=True)
            values = [self.frame(frame, target) for frame, target in pairs]
        else:
            values = [self.frame(frame) for frame in check_video(video)]
        return sum(values) / len(values)

    @abstractmethod
    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        """Score one frame, (3, H, W); `reference` is there if `needs_reference`."""


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
