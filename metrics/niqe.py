"""NIQE: the distance of an image's local statistics from those of good images (Mittal et al., "Making a
'Completely Blind' Image Quality Analyzer", 2013). No reference, no network.

Two metrics share the features of niqe_features.py:

    niqe         the authors' prior (96 px blocks), the figure papers print: mean of the frames' distances
    niqe_fitted  a prior fitted on HR clips by `python -m metrics.fit_niqe`, with any block size; the
                 blocks of all frames form one Gaussian, since small frames hold too few for one each.
                 Comparable only with scores of the same fitted model.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from common.atomic import atomic_file
from common.errors import UserError
from metrics.frame_metric import ClipSize, FrameMetric, Metric, MetricSettings, Scorer
from metrics.luma import luma
from metrics.niqe_features import FEATURES, block_features
from metrics.weights import find_weights

OFFICIAL_BLOCK = 96
_OFFICIAL_FILE = "niqe_pris_params.npz"
_FORMAT = "duo-vsr-niqe-1"


@dataclass(frozen=True)
class NiqeModel:
    """A multivariate Gaussian over block features: `mean` (36,), `covariance` (36, 36), block side in px."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    block: int

    def distance(self, features: NDArray[np.float64]) -> float:
        """√((ν₁-ν₂)ᵀ ((Σ₁+Σ₂)/2)⁺ (ν₁-ν₂)) to the Gaussian of `features` (blocks, 36)."""
        return self.distance_to(*gaussian(features))

    def distance_to(self, mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> float:
        """The same, to a Gaussian that is known."""
        difference = self.mean - mean
        inverse = np.linalg.pinv((self.covariance + covariance) / 2)
        return float(np.sqrt(difference @ inverse @ difference))

    def save(self, path: Path, details: dict[str, object]) -> None:
        """Write a safetensors file; `details` (JSON) says what the model was fitted on."""
        # one entry: safetensors writes several in no fixed order
        header = {"format": _FORMAT, "block": self.block, "details": details}
        with atomic_file(path) as temporary:
            save_file(
                {"mean": self.mean, "covariance": self.covariance},
                str(temporary),
                metadata={"niqe": json.dumps(header, sort_keys=True)},
            )

    @classmethod
    def load(cls, path: Path) -> NiqeModel:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or another kind of file.
        """
        if not path.is_file():
            raise UserError(f"no NIQE model {path}; make it with python -m metrics.fit_niqe --input HR --output {path}")
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {})["niqe"])
                if header["format"] != _FORMAT:
                    raise ValueError("another format")
                return cls(file.get_tensor("mean"), file.get_tensor("covariance"), header["block"])
        except Exception:
            raise UserError(f"{path} is not a NIQE model of python -m metrics.fit_niqe; make it again") from None


def gaussian(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of (blocks, 36) features; flat blocks (NaN) are left out of the covariance.

    Raises:
        UserError: fewer than two usable blocks.
    """
    running = RunningGaussian()
    running.add(features)
    return running.moments()


class RunningGaussian:
    """Mean and covariance of features that come in parts (Chan et al., "Updating Formulae", 1979): blocks are not kept.

    Flat blocks (NaN) are left out of the covariance, and of the mean where they are NaN.
    """

    def __init__(self) -> None:
        self._sums, self._counts = np.zeros(FEATURES), np.zeros(FEATURES)
        self._usable, self._mean, self._scatter = 0, np.zeros(FEATURES), np.zeros((FEATURES, FEATURES))

    def add(self, features: NDArray[np.float64]) -> int:
        """Take (blocks, 36) in; how many of them were usable."""
        self._sums += np.nansum(features, axis=0)
        self._counts += (~np.isnan(features)).sum(axis=0)
        usable = features[~np.isnan(features).any(axis=1)]
        if len(usable):
            mean = usable.mean(axis=0)
            shift, total = mean - self._mean, self._usable + len(usable)
            self._scatter += (usable - mean).T @ (usable - mean)
            self._scatter += np.outer(shift, shift) * (self._usable * len(usable) / total)
            self._mean += shift * (len(usable) / total)
            self._usable = total
        return len(usable)

    def moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """
        Raises:
            UserError: fewer than two usable blocks.
        """
        if self._usable < 2:
            raise UserError(
                f"NIQE found {self._usable} usable blocks: the image is flat or smaller than two blocks; "
                "use larger frames, or a model fitted with a smaller --block"
            )
        return self._sums / self._counts, self._scatter / (self._usable - 1)


class Niqe(FrameMetric):
    """NIQE with the authors' prior, read from an installed basicsr or a weight folder; mean over frames, of which flat
    ones (fewer than two blocks with contrast) are left out."""

    name = "niqe"
    label = "NIQE"
    lower_is_better = True
    needs_reference = False

    def __init__(self, settings: MetricSettings | None = None) -> None:
        super().__init__(settings)
        self.files = [_official_prior(self.settings.weights)]
        with np.load(self.files[0], allow_pickle=False) as prior:
            mean, covariance = prior["mu_pris_param"].reshape(-1), prior["cov_pris_param"]
        if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
            raise UserError(f"{_OFFICIAL_FILE} does not hold NIQE's 36 features; get it again")
        self.model = NiqeModel(mean, covariance, OFFICIAL_BLOCK)

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float | None:
        features = block_features(self.plane(frame), self.model.block)
        flat = (~np.isnan(features).any(axis=1)).sum() < 2
        return None if flat else self.model.distance(features)

    def plane(self, frame: Tensor) -> NDArray[np.float64]:
        """The luma (H, W) that is looked at."""
        return np.round(luma(frame))


class FittedNiqe(Metric):
    """NIQE with the model `settings.niqe_model` fitted on HR clips; the blocks of all frames form one Gaussian."""

    name = "niqe_fitted"
    label = "NIQE (fitted)"
    lower_is_better = True
    needs_reference = False

    def __init__(self, settings: MetricSettings | None = None) -> None:
        super().__init__(settings)
        if self.settings.niqe_model is None:
            raise UserError(
                "niqe_fitted needs --niqe-model FILE; make it from HR clips with "
                "python -m metrics.fit_niqe --input HR --output FILE"
            )
        self.files = [self.settings.niqe_model]
        self.model = NiqeModel.load(self.settings.niqe_model)

    def start(self, size: ClipSize) -> Scorer:
        return _FittedScorer(self.model)


class _FittedScorer(Scorer):
    def __init__(self, model: NiqeModel) -> None:
        self._model, self._gaussian = model, RunningGaussian()

    def add(self, frame: Tensor, reference: Tensor | None = None) -> None:
        self.left_out += not self._gaussian.add(block_features(np.round(luma(frame)), self._model.block))

    def finish(self) -> float:
        return self._model.distance_to(*self._gaussian.moments())


def _official_prior(folder: Path | None) -> Path:
    """The prior inside an installed basicsr (found without importing it), else in a weight folder."""
    try:
        for file in importlib.metadata.files("basicsr") or []:
            if file.name == _OFFICIAL_FILE:
                return Path(str(file.locate()))
    except importlib.metadata.PackageNotFoundError:
        pass
    source = "the source package of basicsr (pip download basicsr --no-deps; Apache-2.0)"
    return find_weights("niqe", _OFFICIAL_FILE, source, folder)
