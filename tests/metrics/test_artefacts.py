"""Grid, noise and flicker: known values on made clips, and their order on a real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from metrics.registry import create


def textured(frames: int = 1, seed: int = 0) -> Tensor:
    return 0.3 + 0.4 * torch.rand(frames, 3, 96, 128, generator=torch.Generator().manual_seed(seed))


def with_noise(clip: Tensor, sigma: float) -> Tensor:
    return clip + sigma * torch.randn(clip.shape[0], 1, *clip.shape[2:], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["grid", "noise"])
def test_the_reference_itself_scores_one(name: str, real_clip: Tensor) -> None:
    assert create(name)(real_clip[:1], real_clip[:1]) == 1


def test_grid_counts_the_energy_across_borders() -> None:
    clip = textured()
    squares = interpolate(avg_pool2d(clip, 16), scale_factor=16.0)
    printed = 0.9 * clip + 0.1 * squares
    plane = (printed[0] * torch.tensor([65.481, 128.553, 24.966])[:, None, None]).sum(0).double().numpy()

    def ratio(plane: np.ndarray) -> float:
        border, elsewhere = [], []
        for lines in (plane, plane.T):
            for row in range(1, len(lines)):
                squared = (lines[row] - lines[row - 1]) ** 2
                (border if row % 16 == 0 else elsewhere).extend(squared)
        return float(np.mean(border) / np.mean(elsewhere))

    original = (clip[0] * torch.tensor([65.481, 128.553, 24.966])[:, None, None]).sum(0).double().numpy()
    expected = ratio(plane) / ratio(original)
    assert create("grid")(printed, clip) == pytest.approx(expected, rel=1e-4)
    assert create("grid")(0.5 * clip + 0.5 * squares, clip) > expected > 1


def test_noise_is_the_deviation_over_the_references() -> None:
    flat = torch.full((1, 3, 400, 400), 0.5)
    own, added = 2 / 255, 3 / 255
    reference = with_noise(flat, own)
    video = reference + added * torch.randn(1, 1, 400, 400, generator=torch.Generator().manual_seed(2))
    # Immerkær's estimate has a few per cent of error on the tenth of 160,000 pixels that happens to be flattest.
    everywhere = np.hypot(own, added) / own
    assert create("noise")(video, reference) == pytest.approx(everywhere, rel=0.15)
    assert create("noise")(flat, reference) < 0.5


def test_noise_in_texture_does_not_count() -> None:
    reference = textured()
    reference[..., :64] = 0.5
    video = reference.clone()
    video[..., 72:] = (video[..., 72:] + 0.2 * torch.rand(1, 1, 96, 56)).clamp(0, 1)
    assert create("noise")(video, reference) == pytest.approx(1)


def test_flicker_of_a_still_clip_is_twice_its_variance() -> None:
    still = interpolate(textured(), scale_factor=2.0, mode="bicubic").clamp(0, 1).repeat(4, 1, 1, 1)
    temporal = create("temporal")
    assert temporal(still, still) < 1e-9
    sigma = 0.02
    noise = torch.randn(still.shape, generator=torch.Generator().manual_seed(3))
    assert temporal(still + sigma * noise, still) == pytest.approx(1000 * 2 * sigma**2, rel=0.02)


def test_flicker_follows_the_motion() -> None:
    large = interpolate(textured(), scale_factor=4.0, mode="bicubic").clamp(0, 1)
    moving = torch.cat([large[..., 20:300, 3 * index : 400 + 3 * index] for index in range(3)])
    squared = (moving[1:] - moving[:-1]).square().mean().item() * 1000
    assert create("temporal")(moving, moving) < 0.05 * squared
