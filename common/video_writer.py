"""Frames into a video file, through FFmpeg: atomic, tagged with the colours that it has.

`common/encoders.py` says which codecs there are and which containers take them.
"""

from __future__ import annotations

import contextlib
import queue
import re
import subprocess
import tempfile
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import ffmpeg
import numpy as np

from common.atomic import atomic_file
from common.bit_depth import BitDepth, for_swscale, pipe_format
from common.encoders import Quality, encoding
from common.errors import UserError
from common.video_probe import Colour, ffmpeg_binary, url
from common.video_reader import EXACT

#: one that FFmpeg is given, and the next [ours]
CLIPS_HELD = 2
#: what FFmpeg begins a line with, and what it says of lines it left out
_SPEAKER = re.compile(r"\[[^\]]* @ 0x[0-9a-f]+\] ?| *Last message repeated \d+ times")


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
        bit_depth: BitDepth = 8,
        sample_aspect_ratio: Fraction = Fraction(1),
        codec: str = "h264",
        encoder_options: dict[str, str] | None = None,
        size: tuple[int, int] | None = None,
        colour: Colour | None = None,
        b_frames: bool = True,
        pipe: int | None = None,
        alpha: bool = False,
        frame_bits: BitDepth | None = None,
    ) -> None:
        """
        Args:
            width: of the frames, px.
            height: of the frames, px.
            quality: lossless is x264 RGB at quantiser 0.
            crf: constant rate factor of lossy files; None: the encoder's own, hard to tell from the source.
            codec: one of ENCODERS or IMAGE_ENCODERS, or y4m.
            encoder_options: FFmpeg's, in place of those of ENCODERS.
            bit_depth: 10 for videos, 16 for images.
            frame_bits: of the frames; where the file has 8 and these 16, luma and chroma are dithered. None: as
                `bit_depth`.
            size: (width, height) that is written, by a Lanczos filter; None: the frames' own.
            colour: primaries and transfer of the frames, which the file is tagged with; BT.709 where unspecified.
            b_frames: off for containers without time stamps.
            pipe: a file descriptor to write to in place of `path`, which is only named in messages.
            alpha: frames are RGBA, for a codec that holds transparency.

        Raises:
            UserError: lossless 10-bit, which x264 cannot write.
        """
        if quality == "lossless" and bit_depth == 10:
            raise UserError("lossless files hold 8 bits; leave out --lossless or --bit-depth 10")
        self.path = Path(path)
        self._file = atomic_file(self.path) if pipe is None else contextlib.nullcontext(self.path)
        temporary = self._file.__enter__()
        self._shape = (height, width, 4 if alpha else 3)
        self._bits = frame_bits or bit_depth
        source = ffmpeg.input(
            "pipe:", format="rawvideo", pix_fmt=pipe_format(self._bits, alpha=alpha),
            s=f"{width}x{height}", r=f"{frame_rate.numerator}/{frame_rate.denominator}",
        )  # fmt: skip
        written = size or (width, height)
        if written != (width, height):
            source = source.filter("scale", *written, flags=f"lanczos+{EXACT}")
        source, options = encoding(
            source, written, codec, quality=quality, crf=crf, wide=bit_depth > 8, encoder_options=encoder_options,
            colour=colour, alpha=alpha,
        )  # fmt: skip
        self._chroma = not options["pix_fmt"].startswith(("rgb", "gbr"))
        if not b_frames:
            options["bf"] = 0
        if sample_aspect_ratio != 1:
            source = source.filter("setsar", str(sample_aspect_ratio))
        if self.path.suffix.lower() in (".mp4", ".mov", ".m4v"):
            options["movflags"] = "+faststart"
        target = url(temporary) if pipe is None else "pipe:1"
        output = ffmpeg.output(source, target, **options).overwrite_output()
        command = output.global_args("-loglevel", "error", "-nostdin").compile(cmd=ffmpeg_binary())
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the writer)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=pipe, stderr=self._log)
        # A thread waits for FFmpeg, so that the next clip is computed while this one is encoded. Two clips at most are
        # held. A Ctrl-C within a queue.Queue can leave it locked, or its reader asleep; SimpleQueue is safe from that.
        self._waiting: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(CLIPS_HELD):
            self._room.put(None)
        self._broken = threading.Event()
        #: in which it waited for FFmpeg to take frames, and to end
        self.seconds = 0.0
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        self._feeder.start()

    def write(self, frames: np.ndarray) -> None:
        """Append frames (F, H, W, 3), or with transparency (F, H, W, 4): uint8, or uint16 of `frame_bits`.

        They are read later, in a thread: they must not change.
        """
        if frames.shape[1:] != self._shape:
            raise ValueError(f"frames of shape {frames.shape[1:]} for a file of {self._shape}")
        if self._broken.is_set():
            raise UserError(f"cannot write {self.path}: {self._message()}")
        self._room.get()
        self._waiting.put(frames)

    def _feed(self) -> None:
        """Hand over what waits, until None comes; after FFmpeg has stopped, throw it away."""
        assert self._process.stdin is not None
        while (frames := self._waiting.get()) is not None:
            began = time.perf_counter()
            for frame in frames:
                if not self._broken.is_set():
                    try:
                        self._process.stdin.write(self._as_piped(frame))
                    except OSError:
                        self._broken.set()
            self.seconds += time.perf_counter() - began
            self._room.put(None)

    def _as_piped(self, frame: np.ndarray) -> memoryview:
        """With as many bits as the pipe's."""
        if self._bits > 8:
            bits = 8 if frame.dtype == np.uint8 else self._bits
            if bits < 16:
                wide = frame.astype(np.uint16)
                frame = (wide << (16 - bits)) | (wide >> (2 * bits - 16))  # white stays white
            if self._chroma:
                frame = for_swscale(frame)
        return np.ascontiguousarray(frame).data

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
        began = time.perf_counter()
        with contextlib.suppress(OSError):  # the process is gone; its exit status says so
            self._process.stdin.close()
        failed = self._process.wait() != 0
        self.seconds += time.perf_counter() - began
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
    text = " ".join(_SPEAKER.sub("", log.decode(errors="replace")).split())
    if re.search(r"no space left", text, re.IGNORECASE):
        return "the disk is full; free space or choose another folder"
    if re.search(r"broken pipe", text, re.IGNORECASE):
        return "what reads it has stopped"
    return text[:300] or "FFmpeg stopped"
