"""Colour fixes: a drift in tone is removed, detail is kept."""

import pytest
import torch

from pipeline.colour_fix import fix_colour, low_frequencies


@pytest.fixture
def source():
    """A smooth picture, away from black and white so that nothing is clamped."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 160), indexing="ij")
    return torch.stack([0.3 * x, 0.2 * y, 0.1 * x * y])[:, None].repeat(1, 2, 1, 1)


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_a_shift_in_tone_is_removed(source, method):
    drifted = source + torch.tensor([0.2, -0.1, 0.05]).view(3, 1, 1, 1)
    assert torch.allclose(fix_colour(drifted, source, method), source, atol=1e-5)


def test_adain_matches_mean_and_deviation(source):
    fixed = fix_colour(0.5 * source.flip(3) + 0.3, source, "adain")
    assert torch.allclose(fixed.mean((2, 3)), source.mean((2, 3)), atol=1e-5)
    assert torch.allclose(fixed.std((2, 3)), source.std((2, 3)), atol=1e-5)


def test_wavelet_keeps_fine_detail(source):
    checks = 0.1 * (torch.arange(160) % 2 * 2 - 1).float()
    fixed = fix_colour(source + 0.2 + checks, source, "wavelet")
    inside = (slice(None), slice(None), slice(32, -32), slice(32, -32))
    assert torch.allclose((fixed - source)[inside], checks[32:-32].expand_as(source[inside]), atol=1e-3)


def test_bfloat16_is_computed_in_float32(source):
    result, reference = source.bfloat16(), source.bfloat16()
    fixed = fix_colour(result, reference, "wavelet")
    assert fixed.dtype == torch.float32
    assert torch.allclose(fixed, result.float(), atol=1e-6)  # in bf16 the differences would be off by 4e-3


def test_flat_frames_stay_flat():
    flat = torch.full((3, 1, 8, 8), 0.25)  # smaller than the coarsest kernel
    assert torch.allclose(low_frequencies(flat), flat)
    assert torch.allclose(fix_colour(flat + 0.5, flat, "adain"), flat, atol=1e-6)
