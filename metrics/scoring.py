"""Score a clip by several metrics in one pass over its frames, and say what the scores rest on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import cache
from itertools import repeat, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.fingerprint import file_sha256
from metrics.clips import Clip
from metrics.frame_metric import ClipSize, Metric

#: packages whose version is told with every score
PACKAGES = ("torch", "numpy", "scipy")
#: in the place of the frames of a clip that ended before the other
_ENDED: Any = object()


class Score(NamedTuple):
    """One metric of one clip.

    Attributes:
        left_out: frames (or pairs of frames) with nothing to measure, which the value does not count.
    """

    value: float
    left_out: int = 0


@torch.inference_mode()
def score_clip(video: Clip, reference: Clip | None, metrics: list[Metric], crop_border: int = 0) -> dict[str, Score]:
    """Every metric of one clip; frames are read once, and no more than a few are held.

    Args:
        crop_border: px left out on each side of both clips.

    Raises:
        UserError: video and reference differ in size, or a clip cannot be read or scored.
    """
    size = video.size
    if reference is not None and reference.size != size:
        hint = "; --max-frames N scores the first N" if reference.size[1:] == size[1:] else ""
        raise UserError(f"{video.path} is {size}, but its reference {reference.path} is {reference.size}{hint}")
    inner = ClipSize(size.frames, size.height - 2 * crop_border, size.width - 2 * crop_border)
    if min(inner) < 1:
        raise UserError(f"{video.path} is {size}: a border of {crop_border} px leaves nothing")
    with ExitStack() as stack:
        scorers = {metric.name: stack.enter_context(closing(metric.start(inner))) for metric in metrics}
        for frame, target in _pairs(video, reference):
            frame, target = _cropped(frame, crop_border), None if target is None else _cropped(target, crop_border)
            for metric in metrics:
                scorers[metric.name].add(frame, target if metric.needs_reference else None)
        return {name: Score(scorer.finish(), scorer.left_out) for name, scorer in scorers.items()}


def _pairs(video: Clip, reference: Clip | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Frame and reference's frame, as many as were counted.

    Raises:
        UserError: one of the clips gives fewer or more.
    """
    expected = video.size.frames
    targets = reference.frames() if reference is not None else repeat(None, expected)
    count = 0
    for count, (frame, target) in enumerate(zip_longest(video.frames(), targets, fillvalue=_ENDED), start=1):
        if frame is _ENDED or target is _ENDED or count > expected:
            count = -1
            break
        yield frame, target
    if count != expected:
        whose = video.path if reference is None else f"{video.path} or its reference"
        raise UserError(f"{whose} did not give the {expected} frames counted; it is damaged, or being written")


def protocol(metric: Metric) -> dict[str, Any]:
    """What a metric's scores rest on beside the frames: its version, weight files and package versions."""
    packages = [package for package in metric.packages if _version(package)]
    return {
        "name": metric.name,
        "version": metric.version,
        "weights": {path.name: _sha256(path) for path in metric.files},
        "packages": {package: _version(package) for package in packages},
    }


def versions() -> dict[str, str | None]:
    """Of the packages that every score rests on."""
    return {name: _version(name) for name in PACKAGES}


def _cropped(frame: Tensor, border: int) -> Tensor:
    return frame[:, border:-border, border:-border] if border else frame


@cache
def _sha256(path: Path) -> str:
    return file_sha256(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
