"""What a quality metric is, the names metrics are asked for by, and the named sets.

    metric = create("ssim")
    metric(video, reference)          # float32 (F, 3, H, W) in [0, 1], both

A metric lives in a module of its own and is listed in `METRICS`; nothing is imported before it is asked for,
so a metric whose optional package is missing costs nothing until then.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.errors import UserError


class Metric(Protocol):
    """One number for one clip.

    Attributes:
        name: key in result files.
        lower_is_better: direction of improvement.
        needs_reference: whether `reference` (the HR clip) must be given.
    """

    name: str
    lower_is_better: bool
    needs_reference: bool

    def __call__(self, video: Tensor, reference: Tensor | None = None) -> float:
        """Score `video`, float32 (F, 3, H, W) RGB in [0, 1]; `reference` has the same shape and range."""
        ...


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


@dataclass(frozen=True)
class Entry:
    """A line of the table of metrics; `factory` is a callable of `module` that takes `MetricSettings`."""

    module: str
    factory: str
    label: str
    lower_is_better: bool
    needs_reference: bool


METRICS: dict[str, Entry] = {
    "psnr": Entry("metrics.psnr", "Psnr", "PSNR", False, True),
    "ssim": Entry("metrics.ssim", "Ssim", "SSIM", False, True),
    "gmsd": Entry("metrics.gmsd", "Gmsd", "GMSD", True, True),
    "lpips": Entry("metrics.lpips", "Lpips", "LPIPS", True, True),
    "niqe": Entry("metrics.niqe", "official_niqe", "NIQE", True, False),
    "niqe_fitted": Entry("metrics.niqe", "fitted_niqe", "NIQE (fitted)", True, False),
    "musiq": Entry("metrics.musiq", "Musiq", "MUSIQ", False, False),
    "clipiqa": Entry("metrics.clipiqa", "ClipIqa", "CLIP-IQA", False, False),
    "dover": Entry("metrics.dover", "Dover", "DOVER", False, False),
    "warping_error": Entry("metrics.warping_error", "WarpingError", "E*warp", True, True),
}

#: metrics that need downloaded weights
_NETWORKS = frozenset({"lpips", "musiq", "clipiqa", "dover", "warping_error"})

SETS: dict[str, tuple[str, ...]] = {
    # the three judges of the preference pairs [paper]
    "paper": ("lpips", "musiq", "dover"),
    # no downloaded weights: one full-reference formula, one NIQE model fitted on HR clips
    "weight-free": ("gmsd", "niqe_fitted"),
}


_WEIGHT_FREE_HINT = f"; the set that needs no weights is weight-free ({', '.join(SETS['weight-free'])})"


def create(name: str, settings: MetricSettings | None = None) -> Metric:
    """The metric called `name`.

    Raises:
        UserError: unknown name, missing package or missing weight file, with the remedy.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METRICS)}"
        raise UserError(f"unknown metric {name!r}; {hint}")
    entry = METRICS[name]
    factory = getattr(importlib.import_module(entry.module), entry.factory)
    return factory(settings or MetricSettings())


def create_all(names: Sequence[str], settings: MetricSettings | None = None) -> list[Metric]:
    """The metrics called `names`.

    Raises:
        UserError: everything that is missing at once, and the set that needs no weights.
    """
    metrics, faults = [], []
    for name in names:
        try:
            metrics.append(create(name, settings))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("; ".join(faults) + ("" if _NETWORKS.isdisjoint(names) else _WEIGHT_FREE_HINT))
    return metrics


def resolve_names(text: str) -> tuple[str, ...]:
    """Metric names from `text`: the name of a set, or names separated by commas."""
    if text in SETS:
        return SETS[text]
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UserError(f"no metric in {text!r}; sets: {', '.join(SETS)}; metrics: {', '.join(METRICS)}")
    return names


def check_video(video: Tensor, what: str = "video") -> Tensor:
    """`video` itself if it is float (F, 3, H, W); a ValueError for the programmer otherwise."""
    if video.ndim != 4 or video.shape[1] != 3 or not torch.is_floating_point(video):
        raise ValueError(
            f"{what} must be float (F, 3, H, W) in [0, 1], not {video.dtype} {tuple(video.shape)}"
        )
    return video


def check_pair(video: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """Video and reference of one shape; a ValueError for the programmer otherwise."""
    if reference is None:
        raise ValueError("this metric needs a reference")
    if video.shape != reference.shape:
        raise ValueError(f"video {tuple(video.shape)} and reference {tuple(reference.shape)} differ in shape")
    return check_video(video), check_video(reference, "reference")
