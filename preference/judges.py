"""The metrics that judge candidates, with the NIQE model they may need fitted on the dataset's own HR
clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from metrics.base import Metric, MetricSettings, create_all, resolve_names
from metrics.fit_niqe import fit_niqe
from pipeline.progress import progress
from preference.candidates import CandidateModel
from preference.clips import ClipFolder
from preference.config import PreferenceConfig
from preference.ranking import Judge

NIQE_MODEL = "niqe.safetensors"


def make_judges(
    config: PreferenceConfig,
    clips: ClipFolder,
    model: CandidateModel,
    output: Path,
    weights: Path | None,
    device: str,
) -> list[Metric]:
    """The metrics of `config.metrics`.

    Where `niqe_fitted` is one of them its model is fitted on the first HR clips and kept as
    OUTPUT/niqe.safetensors; a model that lies there already is used.

    Raises:
        UserError: missing weights, before any candidate is made.
    """
    names = resolve_names(config.metrics)
    others = [name for name in names if name != "niqe_fitted"]
    create_all(others, MetricSettings(weights, None, device))
    niqe = output / NIQE_MODEL
    if "niqe_fitted" in names and not niqe.exists():
        count = min(config.niqe_clips, len(clips))
        fitted, blocks = fit_niqe(_high_resolution(clips, model, count), config.niqe_block)
        output.mkdir(parents=True, exist_ok=True)
        fitted.save(niqe, {"dataset": clips.fingerprint, "clips": count, "blocks": blocks})
    return create_all(names, MetricSettings(weights, niqe, device))


def directions(judges: Iterable[Metric]) -> dict[str, Judge]:
    """How the ranking is to read each metric."""
    return {judge.name: Judge(judge.lower_is_better, judge.needs_reference) for judge in judges}


def _high_resolution(clips: ClipFolder, model: CandidateModel, count: int) -> Iterator[Tensor]:
    with progress(count, "fitting NIQE on HR clips", "clips") as bar:
        for position in range(count):
            yield model.reference(clips[position])[0]
            bar.advance(1)
