"""NIQE: vectorised features against a loop over blocks, its order under blur and noise on a real video."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve, gaussian_filter
from scipy.special import gamma
from torch import Tensor

from common.errors import UserError
from metrics.fit_niqe import fit_niqe
from metrics.frame_metric import MetricSettings
from metrics.luma import luma
from metrics.niqe import FittedNiqe, Niqe, NiqeModel
from metrics.niqe_features import block_features
from metrics.registry import create

BLOCK = 48


@pytest.fixture(scope="module")
def model(real_clip: Tensor) -> NiqeModel:
    return fit_niqe([real_clip], block=32, sharpness=0.3)[0]


def aggd(block: np.ndarray) -> tuple[float, float, float]:
    """The authors' moment matching, one block at a time."""
    grid = np.arange(0.2, 10.001, 0.001)
    table = gamma(2 / grid) ** 2 / gamma(1 / grid) / gamma(3 / grid)
    left = np.sqrt(np.mean(block[block < 0] ** 2))
    right = np.sqrt(np.mean(block[block > 0] ** 2))
    skew = left / right
    ratio = np.mean(np.abs(block)) ** 2 / np.mean(block**2)
    target = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    alpha = grid[np.argmin((table - target) ** 2)]
    scale = np.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return alpha, left * scale, right * scale


def cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def half_matrix(size: int) -> np.ndarray:
    """The resize by a half as a matrix: antialiased bicubic, mirrored borders."""
    matrix = np.zeros((size // 2, size))
    for row in range(size // 2):
        for tap in range(2 * row - 6, 2 * row + 8):
            mirrored = -tap - 1 if tap < 0 else 2 * size - 1 - tap if tap >= size else tap
            matrix[row, mirrored] += 0.5 * cubic((2 * row + 0.5 - tap) / 2)
    return matrix


def features_by_loop(plane: np.ndarray, block: int) -> np.ndarray:
    axis = np.arange(-3, 4)
    window = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * (7 / 6) ** 2))
    window /= window.sum()
    rows, columns = plane.shape[0] // block, plane.shape[1] // block
    plane = plane[: rows * block, : columns * block]
    scales = []
    for side in (block, block // 2):
        mean = convolve(plane, window, mode="nearest")
        deviation = np.sqrt(np.abs(convolve(plane**2, window, mode="nearest") - mean**2))
        normalised = (plane - mean) / (deviation + 1)
        scale = []
        for i in range(rows):
            for j in range(columns):
                part = normalised[i * side : (i + 1) * side, j * side : (j + 1) * side]
                alpha, left, right = aggd(part)
                row = [alpha, (left + right) / 2]
                for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
                    alpha, left, right = aggd(part * np.roll(part, shift, axis=(0, 1)))
                    row += [alpha, (right - left) * gamma(2 / alpha) / gamma(1 / alpha), left, right]
                scale.append(row)
        scales.append(scale)
        plane = half_matrix(plane.shape[0]) @ plane @ half_matrix(plane.shape[1]).T
    return np.concatenate(scales, axis=1)


def test_features_equal_the_loop_over_blocks(real_clip: Tensor) -> None:
    # dither: where a video is exactly flat the sign of a difference is rounding noise in any implementation
    plane = luma(real_clip[0])[100:210, 300:460] + np.random.default_rng(0).uniform(0, 1, (110, 160))
    features = block_features(plane, BLOCK)
    assert features.shape == (2 * 3, 36)
    np.testing.assert_allclose(features, features_by_loop(plane, BLOCK), rtol=1e-6, atol=1e-8)


def test_distance_is_the_written_formula() -> None:
    generator = np.random.default_rng(0)
    features, mean = generator.normal(size=(200, 36)), generator.normal(size=36)
    covariance = np.cov(generator.normal(size=(300, 36)), rowvar=False)
    difference = mean - features.mean(axis=0)
    pooled = (covariance + np.cov(features, rowvar=False)) / 2
    expected = np.sqrt(difference @ np.linalg.solve(pooled, difference))
    assert NiqeModel(mean, covariance, BLOCK).distance(features) == pytest.approx(expected, rel=1e-9)


def under(metric_class: type[Niqe] | type[FittedNiqe], model: NiqeModel) -> Niqe | FittedNiqe:
    """A metric with `model`, without its file."""
    metric = metric_class.__new__(metric_class)
    metric.settings, metric.model = MetricSettings(), model
    return metric


@pytest.mark.parametrize("metric_class", [Niqe, FittedNiqe])
def test_blur_and_noise_score_worse(
    real_clip: Tensor, model: NiqeModel, metric_class: type[Niqe] | type[FittedNiqe]
) -> None:
    metric = under(metric_class, model)
    clip = real_clip[:2]
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    blurred = [torch.from_numpy(gaussian_filter(clip.numpy(), (0, 0, s, s))) for s in (1.0, 2.0)]
    noised = [(clip + s * noise).clamp(0, 1) for s in (0.05, 0.15)]
    for damaged in (blurred, noised):
        scores = [metric(video) for video in (clip, *damaged)]
        assert scores == sorted(scores)
        assert scores[0] < 0.5 * scores[1]


def test_fitted_model_survives_its_file(model: NiqeModel, real_clip: Tensor, tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    model.save(first, {"clips": ["bikes"]})
    NiqeModel.load(first).save(second, {"clips": ["bikes"]})
    assert first.read_bytes() == second.read_bytes()
    from_file = create("niqe_fitted", MetricSettings(niqe_model=first))
    assert from_file(real_clip[:1]) == under(FittedNiqe, model)(real_clip[:1])


def test_official_prior_is_read_from_the_weight_folder(
    model: NiqeModel, real_clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, mu_pris_param=model.mean[None], cov_pris_param=model.covariance)
    (tmp_path / "niqe_pris_params.npz").write_bytes(buffer.getvalue())
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    metric = create("niqe", MetricSettings(weights=tmp_path))
    official = NiqeModel(model.mean, model.covariance, 96)
    expected = np.mean([official.distance(block_features(np.round(luma(frame)), 96)) for frame in real_clip[:2]])
    assert metric(real_clip[:2]) == pytest.approx(expected)


def test_what_niqe_cannot_score_is_said(real_clip: Tensor, model: NiqeModel, tmp_path: Path) -> None:
    metric = under(FittedNiqe, model)
    with pytest.raises(UserError, match="smaller than the NIQE block"):
        metric(real_clip[:, :, :16, :16])
    with pytest.raises(UserError, match="0 usable blocks"):
        metric(torch.full((1, 3, 64, 64), 0.5))
    with pytest.raises(UserError, match="niqe_fitted needs --niqe-model"):
        create("niqe_fitted")
    with pytest.raises(UserError, match="fit_niqe"):
        create("niqe_fitted", MetricSettings(niqe_model=tmp_path / "absent.safetensors"))
    with pytest.raises(UserError, match="sharp blocks"):
        fit_niqe([real_clip[:1, :, :96, :96]], block=48)
