"""SSIM, GMSD and NIQE as pyiqa takes them, and DISTS, each against an independent computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from common.errors import UserError
from metrics.fit_niqe import fit_niqe
from metrics.frame_metric import MetricSettings
from metrics.gmsd import gmsd_plane
from metrics.luma import luma
from metrics.pyiqa_conventions import GmsdPyiqa, NiqePyiqa, SsimPyiqa, yiq_luma
from metrics.registry import create


@pytest.fixture(scope="module")
def pair(real_clip: Tensor) -> tuple[Tensor, Tensor]:
    clip = real_clip[:1, :, :192, :256]
    return (clip + 0.05 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1), clip


def test_yiq_luma_is_a_whole_number_of_grey_levels() -> None:
    frame = torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.0, 0.25], [0.0, 1.0, 1.0]])[:, None]
    assert yiq_luma(frame).tolist() == [[0, 255, round(255 * (0.299 / 2 + 0.587 / 4 + 0.114))]]


def test_ssim_agrees_with_scikit_image_on_that_luma(pair: tuple[Tensor, Tensor]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    video, reference = 1 - pair[0], pair[1]  # many windows run against each other
    x, y = yiq_luma(video[0]), yiq_luma(reference[0])
    _, full = metrics.structural_similarity(
        x, y, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    inner = full[5:-5, 5:-5]
    assert SsimPyiqa()(video, reference) == pytest.approx(inner.clip(min=0).mean(), rel=1e-9)
    assert inner.clip(min=0).mean() > inner.mean() + 0.01


def test_gmsd_is_the_written_formula_with_zeros_outside(pair: tuple[Tensor, Tensor]) -> None:
    prewitt = torch.tensor([[1.0, 0, -1]] * 3).double() / 3
    gradients = []
    for clip in pair:
        half = functional.avg_pool2d(torch.from_numpy(yiq_luma(clip[0]))[None, None], 2)
        both = torch.stack([prewitt, prewitt.T])[:, None]
        gradients.append(functional.conv2d(half, both, padding=1).square().sum(1))
    a, b = gradients
    similarity = (2 * (a * b).sqrt() + 170) / (a + b + 170)
    assert GmsdPyiqa()(*pair) == pytest.approx(similarity.std().item(), rel=1e-9)
    assert GmsdPyiqa()(*pair) != pytest.approx(gmsd_plane(luma(pair[0][0]), luma(pair[1][0])), rel=0.02)


def test_all_three_agree_with_pyiqa(pair: tuple[Tensor, Tensor], real_clip: Tensor, tmp_path: Path) -> None:
    ssim = pytest.importorskip("pyiqa.archs.ssim_arch").SSIM()
    gmsd = pytest.importorskip("pyiqa.archs.gmsd_arch").GMSD()
    niqe = pytest.importorskip("pyiqa.archs.niqe_arch").calculate_niqe
    assert SsimPyiqa()(*pair) == pytest.approx(ssim(*pair).item(), rel=1e-5)
    assert GmsdPyiqa()(*pair) == pytest.approx(gmsd(*pair).item(), rel=1e-4)
    model = fit_niqe([real_clip], block=32, sharpness=0.3)[0]
    np.savez(tmp_path / "niqe_pris_params.npz", mu_pris_param=model.mean[None], cov_pris_param=model.covariance)
    metric = NiqePyiqa(MetricSettings(weights=tmp_path))
    mean, covariance = (torch.from_numpy(x)[None] for x in (metric.model.mean, metric.model.covariance))
    # Noise: where a video is exactly flat the sign of a difference is rounding noise in any implementation.
    noise = torch.randn(real_clip[:1].shape, generator=torch.Generator().manual_seed(0))
    noisy = (real_clip[:1] + 0.05 * noise).clamp(0, 1)
    theirs = niqe(noisy, mu_pris_param=mean, cov_pris_param=covariance).item()
    assert metric(noisy) == pytest.approx(theirs, rel=1e-3)


def test_dists_is_the_written_formula(pair: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    layers = make_layers(cfgs["D"])
    heads = {name: torch.rand(1, 1475, 1, 1) for name in ("alpha", "beta")}
    torch.save(
        {f"features.{name}": value for name, value in layers.state_dict().items()}, tmp_path / "vgg16-397923af.pth"
    )
    torch.save(heads, tmp_path / "dists_weights.pt")
    crops = [clip[..., :32, :48] for clip in pair]

    def stages(frame: Tensor) -> list[Tensor]:
        x = frame.double()
        found = [x]
        mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        x = (x - mean) / deviation
        for layer in layers.double():
            if isinstance(layer, torch.nn.MaxPool2d):
                found.append(x)
                padded = functional.pad(x**2, (1, 1, 1, 1))
                rows = (padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :])[..., ::2, :] / 4
                both = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:])[..., ::2] / 4
                x = (both + 1e-12).sqrt()
            else:
                x = layer(x)
        return found

    with torch.no_grad():
        one, two = (stages(crop) for crop in crops)
    expected, first = 1.0, 0
    total = sum(head.double().sum() for head in heads.values())
    for x, y in zip(one, two, strict=True):
        for channel, (a, b) in enumerate(zip(x[0].numpy(), y[0].numpy(), strict=True)):
            texture = (2 * a.mean() * b.mean() + 1e-6) / (a.mean() ** 2 + b.mean() ** 2 + 1e-6)
            structure = (2 * np.mean((a - a.mean()) * (b - b.mean())) + 1e-6) / (a.var() + b.var() + 1e-6)
            alpha, beta = (heads[name].double()[0, first + channel, 0, 0] / total for name in ("alpha", "beta"))
            expected -= float(alpha * texture + beta * structure)
        first += x.shape[1]
    assert first == 1475
    metric = create("dists", MetricSettings(weights=tmp_path))
    assert metric(*crops) == pytest.approx(expected, abs=2e-4)
    assert metric(crops[1], crops[1]) == pytest.approx(0, abs=1e-5)
    torch.save({"alpha": heads["alpha"]}, tmp_path / "dists_weights.pt")
    with pytest.raises(UserError, match="no weight file of DISTS"):
        create("dists", MetricSettings(weights=tmp_path))
