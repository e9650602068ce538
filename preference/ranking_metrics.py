"""The ranking metrics of the candidates, with the NIQE model they may need fitted on the dataset's own HR clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from common.progress import progress
from metrics.fit_niqe import fit_niqe
from metrics.frame_metric import Metric, MetricSettings
from metrics.registry import create, create_all, resolve_names
from preference.candidates import CandidateModel
from preference.clips import ClipFolder
from preference.config import PreferenceConfig

NIQE_MODEL = "niqe.safetensors"
FITTED = "niqe_fitted"


def open_metrics(config: PreferenceConfig, weights: Path | None, device: str) -> list[Metric]:
    """The metrics of `config.metrics` but for `niqe_fitted`, which needs HR clips: see `fitted_niqe`.

    Raises:
        UserError: everything that is missing, and the set that needs no weights.
    """
    names = [name for name in resolve_names(config.metrics) if name != FITTED]
    settings = MetricSettings(weights=weights, device=device, frames_per_forward=config.frames_per_forward)
    return create_all(names, settings)


def fitted_niqe(
    config: PreferenceConfig, clips: ClipFolder, model: CandidateModel, output: Path, *, keep: bool
) -> Metric:
    """`niqe_fitted` with a model fitted on the first training clips' HR, OUTPUT/niqe.safetensors.

    Args:
        keep: use the model that lies there, because pairs were ranked by it; else it may be another
        dataset's.
    """
    path = output / NIQE_MODEL
    if not (keep and path.exists()):
        count = min(config.niqe_clips, len(clips.training))
        fitted, blocks = fit_niqe(_high_resolution(clips, model, count), config.niqe_block)
        output.mkdir(parents=True, exist_ok=True)
        fitted.save(path, {"dataset": clips.fingerprint, "clips": count, "blocks": blocks})
    return create(FITTED, MetricSettings(niqe_model=path))


def _high_resolution(clips: ClipFolder, model: CandidateModel, count: int) -> Iterator[Tensor]:
    with progress(count, "fitting NIQE on HR clips", "clips") as bar:
        for position in range(count):
            yield model.reference(clips[position])[0]
            bar.advance(1)
