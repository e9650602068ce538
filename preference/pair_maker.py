"""One clip to one pair: candidates, judges, ranking; or the reason why it gives none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from common.storage import StorageConfig
from datagen.dataset.shard_format import Sample
from metrics.registry import resolve_names
from preference.candidates import CandidateModel, Candidates
from preference.clips import Clip, ClipFolder
from preference.config import PreferenceConfig
from preference.ranking import Ranking, differences, is_pair, rank
from preference.ranking_metrics import FITTED, fitted_niqe, open_metrics

#: kinds of dropped clips: a broken candidate, an exception, candidates that hardly differ
BROKEN, FAILED, CLOSE = "broken", "failed", "close"


class Outcome(NamedTuple):
    """A pair, or the record of a dropped clip: its key, kind, reason, and scores where there are any."""

    sample: Sample | None
    dropped: dict[str, Any] | None


@dataclass(frozen=True)
class PairJob:
    """What pairs are made from, the same for everyone who makes some of them."""

    config: PreferenceConfig
    #: model folder of the stage dual_stream
    model: Path
    #: dataset folder or s3:// prefix
    data: str
    #: folder of the pairs, and of the NIQE model where `niqe_fitted` is a judge
    output: Path
    #: folder searched first for the judges' weights
    weights: Path | None = None
    device: str = "cpu"
    storage: StorageConfig | None = None


class PairMaker:
    """Model and judges, opened once; outcomes are pure functions of the clip's position.

    Raises:
        UserError: model, data, weights or packages are missing.
    """

    def __init__(self, job: PairJob, *, keep_niqe: bool = False) -> None:
        """
        Args:
            keep_niqe: use the NIQE model that lies in the output folder.
        """
        config = self._config = job.config
        self._clips = ClipFolder(job.data, job.storage)
        #: in the dataset, to train on
        self.clips = len(self._clips.training)
        self._metrics = open_metrics(config, job.weights, job.device)
        self._model = CandidateModel(job.model, config, job.device)
        if FITTED in resolve_names(config.metrics):
            self._metrics.append(fitted_niqe(config, self._clips, self._model, job.output, keep=keep_niqe))

    def make(self, position: int) -> Outcome:
        """The pair of one clip. Whatever goes wrong with it is recorded; only a lack of memory is raised."""
        key = f"clip {position}"
        try:
            clip = self._clips[position]
            key = clip.key
            return self._pair(clip)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            return Outcome(None, {"key": key, "kind": FAILED, "reason": f"{type(error).__name__}: {error}"})

    def _pair(self, clip: Clip) -> Outcome:
        candidates = self._model.candidates(clip)
        if not bool(clip.z_lr.isfinite().all()):
            return Outcome(None, {"key": clip.key, "kind": BROKEN, "reason": "z_lr is not finite"})
        reference, reference_is = self._model.reference(clip)
        scores: dict[str, list[float]] = {metric.name: [] for metric in self._metrics}
        for index, video in enumerate(self._model.decode_all(candidates.latents)):
            if fault := _fault(candidates.latents[index], video, self._config.black_below):
                record = {"key": clip.key, "kind": BROKEN, "reason": f"candidate {index} is {fault}"}
                return Outcome(None, record | {"noise": candidates.noises[index]})
            for metric in self._metrics:
                scores[metric.name].append(metric(video, reference if metric.needs_reference else None))
        ranking = rank(scores, {metric.name: type(metric) for metric in self._metrics})
        if close := self._close(ranking, scores):
            close_record: dict[str, Any] = {
                "key": clip.key,
                "kind": CLOSE,
                "reason": close,
                "gap": ranking.gap,
                "scores": scores,
            }
            return Outcome(None, close_record)
        record = _record(clip, candidates, scores, ranking) | {"reference": reference_is}
        tensors = {
            "z_win": candidates.latents[ranking.best],
            "z_lose": candidates.latents[ranking.worst],
            "z_lr": clip.z_lr,
        }
        content = save({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()})
        text = json.dumps(record, sort_keys=True).encode()
        return Outcome(Sample(clip.key, {"pair.safetensors": content, "json": text}), None)

    def _close(self, ranking: Ranking, scores: dict[str, list[float]]) -> str | None:
        """Why best and worst are too close for a pair."""
        if not is_pair(ranking, self._config.minimum_gap):
            return f"the combined scores differ by {ranking.gap:.4g}"
        apart = differences(ranking, scores)
        if all(value < self._config.minimum_differences.get(name, 0) for name, value in apart.items()):
            return "no score differs by its minimum: " + ", ".join(
                f"{name} {value:.3g}" for name, value in apart.items()
            )
        return None


def _fault(latent: Tensor, video: Tensor, black_below: float) -> str | None:
    if not bool(latent.isfinite().all()) or not bool(video.isfinite().all()):
        return "not finite"
    return "black" if float(video.mean()) < black_below else None


def _record(clip: Clip, candidates: Candidates, scores: dict[str, list[float]], ranking: Ranking) -> dict[str, Any]:
    return {
        "key": clip.key,
        "caption": candidates.caption,
        "noise_win": candidates.noises[ranking.best],
        "noise_lose": candidates.noises[ranking.worst],
        "candidate_noises": candidates.noises,
        "scores": scores,
        "combined": list(ranking.combined),
        "best": ranking.best,
        "worst": ranking.worst,
        "gap": ranking.gap,
    }
