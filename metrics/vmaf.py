"""VMAF and VMAF-NEG, by the libvmaf inside the bundled FFmpeg (Netflix, models vmaf_v0.6.1 and vmaf_v0.6.1neg).

NEG leaves out the gain that mere sharpening or contrast brings. Both look at luma only.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.video_probe import ffmpeg_binary
from metrics.frame_metric import Metric, check_video
from metrics.luma import luma

#: four scales of 17-tap filters need so many pixels along each side
SMALLEST_SIDE = 96


class Vmaf(Metric):
    """Mean over frames, 0…100. The models were fitted to 1080p seen from three screen heights."""

    name = "vmaf"
    label = "VMAF"
    lower_is_better = False
    needs_reference = True
    model: ClassVar[str] = "vmaf_v0.6.1"

    def __call__(self, video: Tensor, reference: Tensor | None = None) -> float:
        """
        Raises:
            UserError: frames smaller than 96 px, or an FFmpeg without libvmaf.
        """
        assert reference is not None
        height, width = check_video(video).shape[2:]
        if min(height, width) < SMALLEST_SIDE:
            raise UserError(f"{self.name} needs frames of at least {SMALLEST_SIDE} px, not {width}x{height}")
        with tempfile.TemporaryDirectory() as folder:
            inputs: list[str] = []
            for name, clip in (("video", video), ("reference", reference)):
                path = Path(folder, f"{name}.raw")
                path.write_bytes(_luma_planes(clip))
                inputs += ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{width // 2 * 2}x{height // 2 * 2}"]
                inputs += ["-r", "25", "-i", str(path)]
            log = Path(folder, "vmaf.json")
            # The log's path is given relative to the working folder: a filter's argument has its own escapes.
            graph = f"[0:v][1:v]libvmaf=model=version={self.model}:log_fmt=json:log_path={log.name}:n_threads=1"
            command = [ffmpeg_binary(), "-v", "error", "-nostdin", *inputs, "-lavfi", graph, "-f", "null", "-"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode or not log.is_file():
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(
                    f"{self.name}: {ffmpeg_binary()} failed ({reason}); it needs an FFmpeg with libvmaf, as the "
                    "bundled one: unset DUO_VSR_FFMPEG"
                )
            return float(json.loads(log.read_text())["pooled_metrics"]["vmaf"]["mean"])


class VmafNeg(Vmaf):
    """The model without enhancement gain."""

    name = "vmaf_neg"
    label = "VMAF-NEG"
    model = "vmaf_v0.6.1neg"


def _luma_planes(clip: Tensor) -> bytes:
    """yuv420p frames with neutral chroma; an odd last row or column is left out."""
    planes = []
    for frame in clip:
        y = np.round(luma(frame)).astype(np.uint8)
        y = y[: len(y) // 2 * 2, : y.shape[1] // 2 * 2]
        planes += [y.tobytes(), bytes([128]) * (y.size // 2)]
    return b"".join(planes)
