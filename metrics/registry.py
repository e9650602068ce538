"""The metrics by name, and the named sets.

    metric = create("ssim")
    metric(video, reference)          # float32 (F, 3, H, W) in [0, 1], both

An optional package is imported when a metric that needs it is created.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from common.errors import UserError
from common.plugins import load_class
from metrics.clipiqa import ClipIqa
from metrics.cvvdp import Cvvdp
from metrics.dists import Dists
from metrics.dover import Dover, DoverAntialias
from metrics.flat_noise import FlatNoise
from metrics.frame_metric import Metric, MetricSettings
from metrics.gmsd import Gmsd
from metrics.grid import Grid
from metrics.lpips import Lpips
from metrics.musiq import Musiq
from metrics.niqe import FittedNiqe, Niqe
from metrics.psnr import Psnr
from metrics.pyiqa_conventions import GmsdPyiqa, NiqePyiqa, SsimPyiqa
from metrics.ssim import Ssim
from metrics.vmaf import Vmaf, VmafNeg
from metrics.warping_error import DisWarpingError, OwnDisWarpingError, OwnWarpingError, WarpingError

METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        *(Psnr, Ssim, Gmsd, Lpips, Dists, Vmaf, VmafNeg, Cvvdp),
        *(Niqe, FittedNiqe, Musiq, ClipIqa, Dover, DoverAntialias),
        *(SsimPyiqa, GmsdPyiqa, NiqePyiqa),
        *(WarpingError, OwnWarpingError, DisWarpingError, OwnDisWarpingError, Grid, FlatNoise),
    )
}

SETS: dict[str, tuple[str, ...]] = {
    # the three ranking metrics of the preference pairs [paper]
    "paper": ("lpips", "musiq", "dover"),
    # no downloaded weights: one full-reference formula, one NIQE model fitted on HR clips
    "weight-free": ("gmsd", "niqe_fitted"),
}

_WEIGHT_FREE_HINT = f"; the set that needs no weights is weight-free ({', '.join(SETS['weight-free'])})"


def find_metric(name: str) -> type[Metric]:
    """The class of the metric called `name`, or the one at `package.module:Class`.

    Raises:
        UserError: there is none.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" in name:
        return load_class(name, Metric, option="--metrics")  # type: ignore[type-abstract]
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METRICS)}"
    raise UserError(f"unknown metric {name!r}; {hint} (a metric of your own: package.module:Class)")


def create(name: str, settings: MetricSettings | None = None) -> Metric:
    """The metric called `name`.

    Raises:
        UserError: unknown name, missing package or missing weight file, with the remedy.
    """
    return find_metric(name)(settings)


def create_all(names: Sequence[str], settings: MetricSettings | None = None) -> list[Metric]:
    """The metrics called `names`.

    Raises:
        UserError: everything that is missing at once, and the set that needs no weights.
    """
    classes = [find_metric(name) for name in names]
    metrics, faults = [], []
    for metric in classes:
        try:
            metrics.append(metric(settings))
        except UserError as error:
            faults.append(str(error))
    if faults:
        needs_weights = any(metric.needs_weights for metric in classes)
        raise UserError("; ".join(faults) + (_WEIGHT_FREE_HINT if needs_weights else ""))
    return metrics


def resolve_names(text: str) -> tuple[str, ...]:
    """Metric names from `text`: the name of a set, or names separated by commas.

    Raises:
        UserError: there is none.
    """
    if text in SETS:
        return SETS[text]
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"no metric in {text!r}; sets: {', '.join(SETS)}; metrics: {', '.join(METRICS)}")
    return names
