"""PSNR, SSIM and GMSD against brute-force formulas and against their order on a real picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from common.errors import UserError
from metrics.gmsd import gmsd_plane
from metrics.luma import luma
from metrics.registry import create
from metrics.ssim import ssim_plane


def noisy(video: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    return (video + sigma * noise).clamp(0, 1)


def test_psnr_of_a_known_error() -> None:
    video = torch.full((2, 3, 4, 4), 0.5)
    shifted = video.clone()
    shifted[0] += 0.1
    shifted[1] += 0.01
    expected = (20 + 40) / 2  # -20·log10(0.1), -20·log10(0.01)
    assert create("psnr")(shifted, video) == pytest.approx(expected, abs=1e-4)
    assert create("psnr")(video, video) == 100


def test_luma_is_bt601_studio_range() -> None:
    white, black = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
    assert luma(white).item() == pytest.approx(235)
    assert luma(black).item() == pytest.approx(16)
    green = torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1)
    assert luma(green).item() == pytest.approx(16 + 219 * 0.587, abs=1e-2)


def test_ssim_equals_the_written_formula() -> None:
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 255, (17, 19))
    y = np.clip(x + generator.normal(0, 20, x.shape), 0, 255)
    window = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a = (window * (a - mean_a) ** 2).sum()
            variance_b = (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
            )
    assert ssim_plane(x, y) == pytest.approx(np.mean(values), rel=1e-10)


def test_ssim_agrees_with_scikit_image(real_clip: Tensor) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = luma(real_clip[0]), luma(noisy(real_clip, 0.1)[0])
    _, full = metrics.structural_similarity(
        x, y, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert ssim_plane(x, y) == pytest.approx(full[5:-5, 5:-5].mean(), rel=1e-9)


def test_gmsd_equals_the_written_formula() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.uniform(0, 255, (2, 14, 18))

    def gradient(plane: np.ndarray) -> np.ndarray:
        small = np.array([[plane[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(9)] for i in range(7)])
        padded = np.pad(small, 1, mode="edge")
        result = np.empty_like(small)
        for i in range(7):
            for j in range(9):
                patch = padded[i : i + 3, j : j + 3]
                horizontal = (patch[:, 0].sum() - patch[:, 2].sum()) / 3
                vertical = (patch[0].sum() - patch[2].sum()) / 3
                result[i, j] = math.hypot(horizontal, vertical)
        return result

    a, b = gradient(x), gradient(y)
    similarity = (2 * a * b + 170) / (a**2 + b**2 + 170)
    expected = math.sqrt(((similarity - similarity.mean()) ** 2).mean())
    assert gmsd_plane(x, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["psnr", "ssim", "gmsd"])
def test_more_damage_scores_worse(name: str, real_clip: Tensor) -> None:
    metric = create(name)
    blurred = [torch.from_numpy(gaussian_filter(real_clip.numpy(), (0, 0, sigma, sigma))) for sigma in (0.7, 1.5, 3.0)]
    for damaged in ([noisy(real_clip, sigma) for sigma in (0.02, 0.05, 0.1)], blurred):
        scores = [metric(video, real_clip) for video in (real_clip, *damaged)]
        assert scores == sorted(scores, reverse=not metric.lower_is_better)
        assert len(set(scores)) == 4


def test_unknown_metric_suggests_the_near_one() -> None:
    with pytest.raises(UserError, match="did you mean 'psnr'"):
        create("psnrr")
