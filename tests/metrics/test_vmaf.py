"""VMAF, VMAF-NEG and ColorVideoVDP: their ceilings, their order, and what they refuse."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from common.errors import UserError
from common.video_probe import ffmpeg_binary
from metrics.luma import luma
from metrics.registry import create


def blurred(clip: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(clip.numpy(), (0, 0, sigma, sigma)))


@pytest.mark.parametrize("name", ["vmaf", "vmaf_neg", "cvvdp"])
def test_identical_is_best_and_blur_is_worse(name: str, real_clip: Tensor) -> None:
    if name == "cvvdp":
        pytest.importorskip("pycvvdp")
    clip = real_clip[:2, :, :128, :192]
    metric = create(name)
    scores = [metric(video, clip) for video in (clip, blurred(clip, 1.0), blurred(clip, 3.0))]
    assert scores[0] > scores[1] > scores[2]
    assert scores[0] == pytest.approx(10) if name == "cvvdp" else scores[0] > 95


def test_vmaf_is_ffmpegs_own_on_a_file(real_clip: Tensor, tmp_path: Path) -> None:
    """The luma that we compute and hand over, against FFmpeg reading the same luma from y4m files."""
    clip = real_clip[:2, :, :128, :192]
    videos = {"reference": clip, "video": blurred(clip, 1.0)}
    for name, frames in videos.items():
        planes = [np.round(luma(frame)).astype(np.uint8).tobytes() + bytes([128]) * (64 * 96 * 2) for frame in frames]
        header = b"YUV4MPEG2 W192 H128 F25:1 Ip A1:1 C420\n"
        (tmp_path / f"{name}.y4m").write_bytes(header + b"".join(b"FRAME\n" + plane for plane in planes))
    command = [ffmpeg_binary(), "-nostdin", "-i", "video.y4m", "-i", "reference.y4m", "-lavfi", "libvmaf", "-f", "null"]
    done = subprocess.run([*command, "-"], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = float(done.stderr.rsplit("VMAF score: ", 1)[1].split()[0])
    assert create("vmaf")(videos["video"], clip) == pytest.approx(expected, abs=1e-3)


def test_neg_does_not_reward_sharpening(real_clip: Tensor) -> None:
    clip = real_clip[:2, :, :128, :192]
    sharpened = (clip + 1.0 * (clip - blurred(clip, 1.5))).clamp(0, 1)
    gain = {name: create(name)(sharpened, clip) - create(name)(clip, clip) for name in ("vmaf", "vmaf_neg")}
    assert gain["vmaf_neg"] < gain["vmaf"]


def test_small_frames_and_an_ffmpeg_without_vmaf_are_refused(
    real_clip: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = real_clip[:2, :, :64, :192]
    with pytest.raises(UserError, match="at least 96 px, not 192x64"):
        create("vmaf")(clip, clip)
    monkeypatch.setenv("DUO_VSR_FFMPEG", "false")
    with pytest.raises(UserError, match="needs an FFmpeg with libvmaf"):
        create("vmaf")(real_clip[:2, :, :128, :192], real_clip[:2, :, :128, :192])
