"""Warping error E*_warp: how much a clip flickers along its motion (Lai et al., "Learning Blind Video
Temporal Consistency", 2018).

Frame t+1 is warped onto frame t by optical flow and compared where both show the same thing. The flow (RAFT)
is that of the HR clip, so a method is not judged by flow of its own artefacts. Where a set has no HR clips the flow is
the method's own, and the metric has another name: its values do not compare with those on HR flow. A blurred clip
scores well: read E*_warp only beside a measure of sharpness.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from common.errors import UserError
from metrics.frame_metric import ClipSize, Metric, MetricSettings, Scorer
from metrics.luma import luma
from metrics.weights import find_weights, load_state_dict

#: (first, second), both (1, 3, H, W) in [0, 1] -> flow (1, 2, H, W) in px, x then y, from `first` to `second`
FlowEstimator = Callable[[Tensor, Tensor], Tensor]

_FILE = "raft_large_C_T_SKHT_V2-ff5fadd5.pth"
_SOURCE = "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth"
#: RAFT's correlation pyramid needs 16 features across at an eighth of the resolution
_SMALLEST_RAFT_SIDE = 128


class WarpingError(Metric):
    """E*_warp = 1000 × mean squared difference over RGB of non-occluded pixels, frames in [0, 1], mean over
    neighbouring pairs; a pair without a visible pixel is left out. The flow is the reference's."""

    name = "warping_error"
    label = "E*warp"
    lower_is_better = True
    needs_reference = True
    needs_weights = True

    def __init__(self, settings: MetricSettings | None = None, flow: FlowEstimator | None = None) -> None:
        super().__init__(settings)
        if flow is None:
            self.files = [find_weights(self.name, _FILE, _SOURCE, self.settings.weights)]
            flow = raft(self.files[0], self.settings.device)
        self.flow = flow

    def start(self, size: ClipSize) -> Scorer:
        if size.frames < 2:
            raise UserError(f"{self.name} compares neighbouring frames: give a clip of at least two")
        return _WarpingScorer(self)


class _WarpingScorer(Scorer):
    def __init__(self, metric: WarpingError) -> None:
        self._metric = metric
        #: the frame before and the one its flow is taken from, (1, 3, H, W)
        self._last: tuple[Tensor, Tensor] | None = None
        self._errors: list[float] = []

    def add(self, frame: Tensor, reference: Tensor | None = None) -> None:
        video = frame[None].to(self._metric.settings.device)
        guide = video if reference is None else reference[None].to(video)
        if self._last is not None:
            before, here = self._last
            forward, backward = self._metric.flow(here, guide), self._metric.flow(guide, here)
            visible = ~(occluded(forward, backward) | motion_boundary(forward))
            visible &= inside(forward)
            squared = (warp(video, forward) - before).square().mean(dim=1, keepdim=True)
            if visible.any():
                self._errors.append(squared[visible].mean().item())
            else:
                self.left_out += 1
        self._last = video, guide

    def finish(self) -> float:
        if not self._errors:
            raise UserError(f"{self._metric.name} found no pixel that stays visible between any two frames")
        return 1000 * sum(self._errors) / len(self._errors)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """`image` (B, C, H, W) looked up at x + flow(x) bilinearly: the second frame brought onto the first."""
    height, width = image.shape[2:]
    x, y = _targets(flow)
    grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), dim=-1)
    return functional.grid_sample(image, grid, padding_mode="border", align_corners=True)


def inside(flow: Tensor) -> Tensor:
    """Whether x + flow(x) lies in the frame, bool (B, 1, H, W)."""
    height, width = flow.shape[2:]
    x, y = _targets(flow)
    return ((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))[:, None]


def occluded(forward: Tensor, backward: Tensor) -> Tensor:
    """Forward-backward check: |f + warp(b)|² > 0.01·(|f|² + |warp(b)|²) + 0.5, bool (B, 1, H, W)."""
    returned = warp(backward, forward)
    mismatch = _squared_length(forward + returned)
    return mismatch > 0.01 * (_squared_length(forward) + _squared_length(returned)) + 0.5


def motion_boundary(flow: Tensor) -> Tensor:
    """Where flow changes too fast to be trusted: |∇u|² + |∇v|² > 0.01·|f|² + 0.002, bool (B, 1, H, W)."""
    along_x = functional.pad(flow[..., :, 1:] - flow[..., :, :-1], (0, 1))
    along_y = functional.pad(flow[..., 1:, :] - flow[..., :-1, :], (0, 0, 0, 1))
    change = _squared_length(along_x) + _squared_length(along_y)
    return change > 0.01 * _squared_length(flow) + 0.002


def raft(path: Path, device: str) -> FlowEstimator:
    """torchvision's RAFT (large) from a local weight file.

    Raises:
        UserError: the file is damaged.
    """
    from torchvision.models.optical_flow import raft_large

    network = raft_large(weights=None)
    network.load_state_dict(load_state_dict(path))
    network = network.requires_grad_(False).eval().to(device)

    def estimate(first: Tensor, second: Tensor) -> Tensor:
        height, width = first.shape[2:]
        # RAFT wants multiples of 8 and [-1, 1]; borders are repeated and cut off again
        pad = (0, _missing(width), 0, _missing(height))
        first, second = (functional.pad(frame * 2 - 1, pad, mode="replicate") for frame in (first, second))
        return network(first, second)[-1][..., :height, :width]

    return estimate


def _missing(size: int) -> int:
    return max(-size % 8, _SMALLEST_RAFT_SIDE - size)


def _targets(flow: Tensor) -> tuple[Tensor, Tensor]:
    height, width = flow.shape[2:]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None]
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype)
    return columns + flow[:, 0], rows + flow[:, 1]


def _squared_length(flow: Tensor) -> Tensor:
    return flow.square().sum(dim=1, keepdim=True)


class DisWarpingError(WarpingError):
    """E*_warp on OpenCV's DIS flow (Kroeger et al., ECCV 2016), which needs no weights. Its values compare with each
    other only: the flow differs from RAFT's."""

    name = "temporal"
    label = "E*warp (DIS)"
    needs_weights = False
    packages = ("opencv-python-headless",)

    def __init__(self, settings: MetricSettings | None = None) -> None:
        super().__init__(settings, flow=dis())


class OwnWarpingError(WarpingError):
    """E*_warp on RAFT flow of the scored clip itself, for sets without HR clips."""

    name = "warping_error_own"
    label = "E*warp (own flow)"
    needs_reference = False


class OwnDisWarpingError(DisWarpingError):
    """E*_warp on DIS flow of the scored clip itself, for sets without HR clips."""

    name = "temporal_own"
    label = "E*warp (DIS, own flow)"
    needs_reference = False


def dis() -> FlowEstimator:
    """Dense inverse search at its medium preset, on grey frames of 8 bit."""
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def estimate(first: Tensor, second: Tensor) -> Tensor:
        grey = [luma(frame[0]).round().astype(np.uint8) for frame in (first, second)]
        flow = search.calc(grey[0], grey[1], np.zeros((*grey[0].shape, 2), np.float32))
        return torch.from_numpy(flow).permute(2, 0, 1)[None].to(first)

    return estimate
