"""Frames into a video file, through FFmpeg: atomic, tagged with the colours that it has.

`ENCODERS` says which codecs there are, what each costs in bits and which containers take it.
"""

from __future__ import annotations

import contextlib
import queue
import re
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import ffmpeg
import numpy as np

from common.atomic import atomic_file
from common.errors import UserError
from common.video_probe import BT709, BT2020, BT2020_CL, BT2020_NCL, UNSPECIFIED, Colour, ffmpeg_binary, url
from common.video_reader import EXACT

Quality = Literal["lossy", "lossless"]


@dataclass(frozen=True)
class Encoder:
    """One of FFmpeg's encoders."""

    name: str
    #: containers that take it
    suffixes: tuple[str, ...]
    #: that is hard to tell from the source; None: the encoder has no such number
    crf: float | None
    #: for 8 and 10 bits
    pixel_formats: tuple[str, str] = ("yuv420p", "yuv420p10le")
    options: dict[str, Any] = field(default_factory=dict)


ENCODERS: dict[str, Encoder] = {
    "h264": Encoder("libx264", (".mp4", ".mkv", ".mov", ".m4v", ".avi"), 15, options={"preset": "medium"}),
    "hevc": Encoder(
        "libx265", (".mp4", ".mkv", ".mov", ".m4v"), 17,
        options={"preset": "medium", "tag:v": "hvc1", "x265-params": "log-level=error"},
    ),
    "av1": Encoder("libsvtav1", (".mp4", ".mkv", ".webm"), 23, options={"preset": "6"}),
    "vp9": Encoder("libvpx-vp9", (".webm", ".mkv", ".mp4"), 20, options={"b:v": "0", "row-mt": "1"}),
    "prores": Encoder(
        "prores_ks", (".mov",), None, ("yuv422p10le", "yuv422p10le"), {"profile:v": "hq", "vendor": "apl0"},
    ),
}  # fmt: skip
#: containers that take what is written here
OUTPUT_SUFFIXES = (".mp4", ".mkv", ".mov", ".m4v", ".avi", ".webm")


class VideoWriter:
    """Write frames to a video file atomically.

    Use as a context manager; an exception inside removes what was written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        width: int,
        height: int,
        frame_rate: Fraction,
        quality: Quality = "lossy",
        crf: float | None = None,
        bit_depth: Literal[8, 10] = 8,
        sample_aspect_ratio: Fraction = Fraction(1),
        codec: str = "h264",
        encoder_options: dict[str, str] | None = None,
        size: tuple[int, int] | None = None,
        colour: Colour | None = None,
        b_frames: bool = True,
    ) -> None:
        """
        Args:
            width: of the frames, px.
            height: of the frames, px.
            quality: lossless is x264 RGB at quantiser 0.
            crf: constant rate factor of lossy files; None: the encoder's own, hard to tell from the source.
            codec: one of ENCODERS.
            encoder_options: FFmpeg's, in place of those of ENCODERS.
            bit_depth: 10 writes yuv420p10 and takes uint16 frames holding 10-bit values as well as uint8.
            size: (width, height) that is written, by a Lanczos filter; None: the frames' own.
            colour: primaries and transfer of the frames, which the file is tagged with; BT.709 where unspecified.
            b_frames: off for containers without time stamps.

        Raises:
            UserError: lossless 10-bit, which x264 cannot write.
        """
        if quality == "lossless" and bit_depth == 10:
            raise UserError("lossless files hold 8 bits; leave out --lossless or --bit-depth 10")
        self.path = Path(path)
        self._file = atomic_file(self.path)
        temporary = self._file.__enter__()
        self._shape = (height, width, 3)
        self._wide = bit_depth == 10
        source = ffmpeg.input(
            "pipe:", format="rawvideo", pix_fmt="rgb48le" if self._wide else "rgb24",
            s=f"{width}x{height}", r=f"{frame_rate.numerator}/{frame_rate.denominator}",
        )  # fmt: skip
        written = size or (width, height)
        if written != (width, height):
            source = source.filter("scale", *written, flags=f"lanczos+{EXACT}")
        encoder = ENCODERS[codec]
        options: dict[str, Any] = encoder.options | (encoder_options or {})
        if quality == "lossless":
            options = {"preset": "medium", "vcodec": "libx264rgb", "qp": 0, "pix_fmt": "rgb24"}
        else:
            options |= {"vcodec": encoder.name, "pix_fmt": encoder.pixel_formats[self._wide]}
            if encoder.crf is not None:
                options["crf"] = encoder.crf if crf is None else crf
            tags = _tags(colour or Colour())
            named = {"colorspace": tags.matrix, "color_primaries": tags.primaries, "color_trc": tags.transfer}
            options |= named  # FFmpeg before 8 takes the tags from here, later ones from the frames
            matrix = "bt2020" if tags.matrix == BT2020_NCL else "bt709"
            source = source.filter("scale", out_color_matrix=matrix, out_range="tv", flags=f"bicubic+{EXACT}")
            source = source.filter("format", options["pix_fmt"]).filter("setparams", range="tv", **named)
            if written[0] % 2 or written[1] % 2:  # 4:2:0 needs even sides
                source = source.filter("pad", written[0] + written[0] % 2, written[1] + written[1] % 2)
        if not b_frames:
            options["bf"] = 0
        if sample_aspect_ratio != 1:
            source = source.filter("setsar", str(sample_aspect_ratio))
        if self.path.suffix.lower() in (".mp4", ".mov", ".m4v"):
            options["movflags"] = "+faststart"
        output = ffmpeg.output(source, url(temporary), **options).overwrite_output()
        command = output.global_args("-loglevel", "error", "-nostdin").compile(cmd=ffmpeg_binary())
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the writer)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self._log)
        # A thread waits for FFmpeg, so that the next clip is computed while this one is encoded.
        self._waiting: queue.Queue[bytes | None] = queue.Queue(1)
        self._broken = threading.Event()
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        self._feeder.start()

    def write(self, frames: np.ndarray) -> None:
        """Append frames (F, H, W, 3): uint8, or uint16 with 10-bit values for a 10-bit file."""
        if frames.shape[1:] != self._shape:
            raise ValueError(f"frames of shape {frames.shape[1:]} for a file of {self._shape}")
        if self._wide:
            bits = 8 if frames.dtype == np.uint8 else 10
            wide = frames.astype(np.uint16)
            frames = (wide << (16 - bits)) | (wide >> (2 * bits - 16))  # white stays white
        if self._broken.is_set():
            raise UserError(f"cannot write {self.path}: {self._message()}")
        self._waiting.put(np.ascontiguousarray(frames).tobytes())

    def _feed(self) -> None:
        """Hand over what waits, until None comes; after FFmpeg has stopped, throw it away."""
        assert self._process.stdin is not None
        while (content := self._waiting.get()) is not None:
            if not self._broken.is_set():
                try:
                    self._process.stdin.write(content)
                except OSError:
                    self._broken.set()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._waiting.put(None)
        self._feeder.join()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the process is gone; its exit status says so
            self._process.stdin.close()
        failed = self._process.wait() != 0
        message = self._message()
        self._log.close()
        if kind is None and failed:
            failure = UserError(f"cannot write {self.path}: {message}")
            self._file.__exit__(UserError, failure, None)
            raise failure
        self._file.__exit__(kind, error, trace)

    def _message(self) -> str:
        self._log.seek(0)
        return ffmpeg_reason(self._log.read())


def ffmpeg_reason(log: bytes) -> str:
    """One line of why FFmpeg stopped."""
    text = " ".join(log.decode(errors="replace").split())
    if re.search(r"no space left", text, re.IGNORECASE):
        return "the disk is full; free space or choose another folder"
    return text[:300] or "FFmpeg stopped"


def _tags(colour: Colour) -> Colour:
    """Of a written file: the source's primaries and transfer, and the matrix that belongs to them."""
    wide = colour.matrix in (BT2020_NCL, BT2020_CL)
    primaries = (BT2020 if wide else BT709) if colour.primaries in (UNSPECIFIED, 0, 3) else colour.primaries
    transfer = BT709 if colour.transfer in (UNSPECIFIED, 0, 3) else colour.transfer
    return Colour(BT2020_NCL if primaries == BT2020 else BT709, primaries, transfer)
