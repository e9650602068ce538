"""VMAF and VMAF-NEG, by the libvmaf inside the bundled FFmpeg (Netflix, models vmaf_v0.6.1 and vmaf_v0.6.1neg).

NEG leaves out the gain that mere sharpening or contrast brings. Both look at luma only. Frames go to FFmpeg through one
pipe, the video's above the reference's.
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
from metrics.frame_metric import ClipSize, Metric, Scorer
from metrics.luma import luma

#: four scales of 17-tap filters need so many pixels along each side
SMALLEST_SIDE = 96


class Vmaf(Metric):
    """Mean over frames, 0…100. The models were fitted to 1080p seen from three screen heights."""

    name = "vmaf"
    label = "VMAF"
    lower_is_better = False
    needs_reference = True
    packages = ("imageio-ffmpeg",)
    model: ClassVar[str] = "vmaf_v0.6.1"

    def start(self, size: ClipSize) -> Scorer:
        """
        Raises:
            UserError: frames smaller than 96 px.
        """
        if min(size.height, size.width) < SMALLEST_SIDE:
            wanted = f"frames of at least {SMALLEST_SIDE} px"
            raise UserError(f"{self.name} needs {wanted}, not {size.width}x{size.height}")
        return _VmafScorer(self.name, self.model, size)


class VmafNeg(Vmaf):
    """The model without enhancement gain."""

    name = "vmaf_neg"
    label = "VMAF-NEG"
    model = "vmaf_v0.6.1neg"


class _VmafScorer(Scorer):
    def __init__(self, name: str, model: str, size: ClipSize) -> None:
        self._name = name
        self._height, self._width = size.height // 2 * 2, size.width // 2 * 2  # an odd last row or column is left out
        self._folder = tempfile.TemporaryDirectory()
        self._report, log = Path(self._folder.name, "vmaf.json"), Path(self._folder.name, "log")
        # The report's path is given relative to the working folder: a filter's argument has its own escapes.
        graph = "[0:v]split[a][b];[a]crop=iw:ih/2:0:0[video];[b]crop=iw:ih/2:0:ih/2[reference];[video][reference]"
        graph += f"libvmaf=model=version={model}:log_fmt=json:log_path={self._report.name}:n_threads=1"
        command = [ffmpeg_binary(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-r", "25"]
        command += ["-s", f"{self._width}x{2 * self._height}", "-i", "pipe:0", "-lavfi", graph, "-f", "null", "-"]
        self._log = log
        with log.open("wb") as errors:
            self._ffmpeg = subprocess.Popen(command, cwd=self._folder.name, stdin=subprocess.PIPE, stderr=errors)

    def add(self, frame: Tensor, reference: Tensor | None = None) -> None:
        assert reference is not None and self._ffmpeg.stdin is not None
        planes = [np.round(luma(image)).astype(np.uint8)[: self._height, : self._width] for image in (frame, reference)]
        neutral = bytes([128]) * planes[0].size  # chroma of both, a quarter each
        try:
            self._ffmpeg.stdin.write(b"".join((*(plane.tobytes() for plane in planes), neutral)))
        except BrokenPipeError:
            raise self._failed() from None

    def finish(self) -> float:
        """
        Raises:
            UserError: an FFmpeg without libvmaf.
        """
        assert self._ffmpeg.stdin is not None
        try:
            self._ffmpeg.stdin.close()
        except BrokenPipeError:
            raise self._failed() from None
        if self._ffmpeg.wait() or not self._report.is_file():
            raise self._failed()
        return float(json.loads(self._report.read_text())["pooled_metrics"]["vmaf"]["mean"])

    def close(self) -> None:
        self._ffmpeg.kill()
        self._ffmpeg.wait()
        self._folder.cleanup()

    def _failed(self) -> UserError:
        self._ffmpeg.wait()
        reason = (self._log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        return UserError(
            f"{self._name}: {ffmpeg_binary()} failed ({reason}); it needs an FFmpeg with libvmaf, as the "
            "bundled one: unset DUO_VSR_FFMPEG"
        )
