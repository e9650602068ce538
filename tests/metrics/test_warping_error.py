"""E*_warp on clips whose motion is known exactly, its masks against loops, and RAFT from a local file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from metrics.frame_metric import MetricSettings
from metrics.registry import create
from metrics.warping_error import WarpingError, inside, motion_boundary, occluded, warp

DX, DY = 3, -2


def known_flow(first: Tensor, second: Tensor) -> Tensor:
    """The video of `moving` shifts content by (DX, DY) per frame; its flow back is the negative."""
    sign = 1.0 if first[0, 0, 0, 0] < second[0, 0, 0, 0] else -1.0  # the corner holds the frame's number
    flow = torch.tensor([DX, DY]).float() * sign
    return flow.reshape(1, 2, 1, 1).expand(1, 2, *first.shape[2:])


@pytest.fixture
def moving() -> Tensor:
    texture = torch.rand((3, 80, 80), generator=torch.Generator().manual_seed(0))
    frames = []
    for index in range(4):
        left, top = 30 - DX * index, 30 - DY * index
        frame = texture[:, top : top + 40, left : left + 40].clone()
        frame[:, 0, 0] = 0.1 * index
        frames.append(frame)
    return torch.stack(frames)


def test_exact_motion_has_no_error_and_wrong_flow_has(moving: Tensor) -> None:
    metric = WarpingError(flow=known_flow)
    # the numbered corner is the only pixel that does not move along: 1 of about 37·38 visible ones
    assert metric(moving, moving) < 1000 / (37 * 38) + 1e-3
    still = WarpingError(flow=lambda first, second: torch.zeros(1, 2, *first.shape[2:]))
    assert still(moving, moving) == pytest.approx(1000 / 6, rel=0.1)  # two independent uniform draws


def test_flicker_is_measured_exactly_and_flow_comes_from_the_reference(moving: Tensor) -> None:
    flat = torch.full_like(moving, 0.5)
    flat[1::2] += 0.2
    assert WarpingError(flow=known_flow)(flat, moving) == pytest.approx(1000 * 0.2**2, rel=1e-4)


def test_warp_follows_the_flow_between_pixels() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 6, 8).contiguous()
    flow = torch.zeros(1, 2, 6, 8)
    flow[:, 0] = 0.5
    assert torch.allclose(warp(ramp, flow)[..., :7], ramp[..., :7] + 0.5, atol=1e-5)
    assert inside(flow)[0, 0, 0].tolist() == [True] * 7 + [False]


def test_masks_equal_the_written_rules() -> None:
    generator = torch.Generator().manual_seed(0)
    height, width = 9, 11
    forward = torch.randint(-2, 3, (1, 2, height, width), generator=generator).float()
    backward = torch.randint(-2, 3, (1, 2, height, width), generator=generator).float()
    hidden, edge = occluded(forward, backward)[0, 0], motion_boundary(forward)[0, 0]
    for y in range(height):
        for x in range(width):
            f = forward[0, :, y, x].numpy()
            to_y, to_x = (int(np.clip(v, 0, m - 1)) for v, m in ((y + f[1], height), (x + f[0], width)))
            b = backward[0, :, to_y, to_x].numpy()
            assert hidden[y, x] == (((f + b) ** 2).sum() > 0.01 * ((f**2).sum() + (b**2).sum()) + 0.5)
            change = 0.0
            if x + 1 < width:
                change += ((forward[0, :, y, x + 1].numpy() - f) ** 2).sum()
            if y + 1 < height:
                change += ((forward[0, :, y + 1, x].numpy() - f) ** 2).sum()
            assert edge[y, x] == (change > 0.01 * (f**2).sum() + 0.002)
    assert hidden.any()
    assert not hidden.all()


def test_raft_runs_from_a_local_file(tmp_path: Path, real_clip: Tensor) -> None:
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    torch.save(raft_large(weights=None).state_dict(), tmp_path / "raft_large_C_T_SKHT_V2-ff5fadd5.pth")
    metric = create("warping_error", MetricSettings(weights=tmp_path))
    clip = real_clip[:2, :, :100, :130]  # neither side a multiple of 8, one below RAFT's smallest
    flow = metric.flow(clip[:1], clip[1:])  # type: ignore[attr-defined]
    assert flow.shape == (1, 2, 100, 130)
    assert torch.isfinite(flow).all()


def test_missing_and_damaged_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(UserError, match=r"raft_large_C_T_SKHT_V2-ff5fadd5\.pth.*put it in"):
        create("warping_error")
    (tmp_path / "raft_large_C_T_SKHT_V2-ff5fadd5.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="not a readable PyTorch weight file"):
        create("warping_error", MetricSettings(weights=tmp_path))
