"""Frames of a video in and out, through FFmpeg: they stream, each with its time.

Frames are uint8 RGB. Colours: an untagged video is decoded as BT.709 from 720 lines on and as BT.601 below; chroma is
enlarged exactly; what is written says which matrix it has.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import ffmpeg
import numpy as np

from common.atomic import atomic_file
from common.errors import UserError
from common.video_probe import BT709, BT2020, BT2020_CL, BT2020_NCL, UNSPECIFIED, Colour, ffmpeg_binary, probe, url

#: containers that take what is written here
OUTPUT_SUFFIXES = (".mp4", ".mkv", ".mov", ".m4v", ".avi")
Quality = Literal["lossy", "lossless"]
Deinterlace = Literal["auto", "bwdif", "off"]

#: rounding and interpolation without swscale's short cuts, which shift chroma and darken by a level
EXACT = "accurate_rnd+full_chroma_int+full_chroma_inp"

_TIME_BASE = re.compile(rb"showinfo.*config in time_base: (\d+)/(\d+)")
_FRAME = re.compile(rb"showinfo.*\] n: *\d+ pts: *(-?\d+|NOPTS) ")
_ERROR = re.compile(rb"\[(?:error|fatal|panic)\] ?(.*)")


class VideoReader:
    """Iterates over frames, each (H, W, 3) RGB; afterwards and meanwhile knows their times and what failed.

    Frames are uint8, or uint16 in 0…65535 where 16 bits were asked for.

    Raises:
        UserError: not a video.
    """

    def __init__(
        self,
        path: str | Path,
        start: int = 0,
        frames: int | None = None,
        *,
        size: tuple[int, int] | None = None,
        frame_rate: Fraction | None = None,
        deinterlace: Deinterlace = "off",
        bits: Literal[8, 16] = 8,
    ) -> None:
        """
        Args:
            start: number of the first frame, after `frame_rate` and `deinterlace`.
            frames: how many; None: all.
            size: (width, height) that frames are resized to, by the mean of the pixels that each new one covers.
            frame_rate: frames are repeated and dropped to this constant rate; None: all, with the times they have.
            deinterlace: bwdif, or auto: bwdif for the frames that are marked as interlaced.
            bits: 16 for videos of more than 8 bits.
        """
        self.path, self._start, self._limit = path, start, frames
        self._kind: type = np.uint8 if bits == 8 else np.uint16
        self._pixel_format = "rgb24" if bits == 8 else "rgb48le"
        self.info = probe(path)
        self.width, self.height = size or (self.info.width, self.info.height)
        #: seconds of one unit of `pts`
        self.time_base = Fraction(1)
        #: time stamp of each frame that was given out, as in the file
        self.pts: list[int | None] = []
        #: FFmpeg's errors so far
        self.errors: list[str] = []
        self.count = 0
        self._command = self._compile(frame_rate, deinterlace)

    def __iter__(self) -> Iterator[np.ndarray]:
        shape = (self.height, self.width, 3)
        with tempfile.NamedTemporaryFile() as log, open(log.name, "rb") as lines:
            process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log)
            assert process.stdout is not None
            try:
                while process.stdout.readinto(frame := np.empty(shape, self._kind)) == frame.nbytes:  # type: ignore
                    self.count += 1
                    self._read_log(lines)
                    yield frame
                failed = process.wait() != 0
                self._read_log(lines)
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
        if (failed or self.count == 0) and not self.errors and self._limit != 0:
            self.errors.append("no more frames")

    @property
    def lost_frames(self) -> int:
        """Frames that the header promises and that did not come; 0 where it promises nothing."""
        if self._limit is not None or self.info.frames is None:
            return 0
        return max(0, self.info.frames - self._start - self.count)

    def _compile(self, frame_rate: Fraction | None, deinterlace: Deinterlace) -> list[str]:
        trim: dict[str, int] = {"start_frame": self._start}
        if self._limit is not None:
            trim["end_frame"] = self._start + self._limit
        stream = ffmpeg.input(url(self.path))[str(self.info.stream_index)]
        if deinterlace == "bwdif" or (deinterlace == "auto" and self.info.interlaced):
            marked = "interlaced" if deinterlace == "auto" else "all"
            stream = stream.filter("bwdif", mode="send_frame", deint=marked)
        if frame_rate is not None:
            stream = stream.filter("fps", f"{frame_rate.numerator}/{frame_rate.denominator}")
        stream = stream.filter("trim", **trim).filter("showinfo", checksum=0)
        resized = (self.width, self.height) != (self.info.width, self.info.height)
        size = (self.width, self.height) if resized else ()
        flags = f"{'area' if resized else 'bicubic'}+{EXACT}"
        stream = stream.filter("scale", *size, flags=flags, **self._matrix())
        stream = stream.filter("format", self._pixel_format)
        output = stream.output("pipe:", format="rawvideo", pix_fmt=self._pixel_format, fps_mode="passthrough")
        # Without copyts, FFmpeg counts from the first stream of some containers and from the video of others.
        quiet = ("-hide_banner", "-nostdin", "-nostats", "-copyts", "-loglevel", "repeat+level+info")
        return list(output.global_args(*quiet).compile(cmd=ffmpeg_binary()))

    def _matrix(self) -> dict[str, str]:
        """What an untagged video is decoded with; a tagged one says it itself."""
        if self.info.colour.matrix != UNSPECIFIED:
            return {}
        return {"in_color_matrix": "bt709" if self.info.matrix == BT709 else "smpte170m"}

    def _read_log(self, log: IO[bytes]) -> None:
        while (line := log.readline()).endswith(b"\n"):
            if frame := _FRAME.search(line):
                self.pts.append(None if frame[1] == b"NOPTS" else int(frame[1]))
            elif base := _TIME_BASE.search(line):
                self.time_base = Fraction(int(base[1]), int(base[2]))
            elif error := _ERROR.search(line):
                self.errors.append(error[1].decode(errors="replace").strip()[:300])
        log.seek(-len(line), 1)  # FFmpeg is in the middle of this one


def read_frames(
    path: str | Path, start: int = 0, frames: int | None = None, size: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """The frames of `VideoReader`, for those who want all of an intact video.

    Raises:
        UserError: not a video, or the file breaks off while it is decoded.
    """
    reader = VideoReader(path, start, frames, size=size)
    yield from reader
    if reader.errors and (reader.lost_frames or reader.count == 0):
        raise UserError(f"{path} breaks off after {reader.count} frames: {reader.errors[0]}")


def read_video(path: str | Path, start: int = 0, frames: int | None = None) -> np.ndarray:
    """All frames (or `frames` of them) at once, uint8 (F, H, W, 3)."""
    return np.stack(list(read_frames(path, start, frames)))


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
        crf: float = 15,
        bit_depth: Literal[8, 10] = 8,
        sample_aspect_ratio: Fraction = Fraction(1),
        codec: str = "libx264",
        preset: str = "medium",
        size: tuple[int, int] | None = None,
        colour: Colour | None = None,
        b_frames: bool = True,
    ) -> None:
        """
        Args:
            width: of the frames, px.
            height: of the frames, px.
            quality: lossless is x264 RGB at quantiser 0.
            crf: constant rate factor of lossy files; 15 is visually lossless.
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
        options: dict[str, Any] = {"preset": preset}
        if quality == "lossless":
            options |= {"vcodec": "libx264rgb", "qp": 0, "pix_fmt": "rgb24"}
        else:
            options |= {"vcodec": codec, "crf": crf, "pix_fmt": "yuv420p10le" if self._wide else "yuv420p"}
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

    def write(self, frames: np.ndarray) -> None:
        """Append frames (F, H, W, 3): uint8, or uint16 with 10-bit values for a 10-bit file."""
        if frames.shape[1:] != self._shape:
            raise ValueError(f"frames of shape {frames.shape[1:]} for a file of {self._shape}")
        if self._wide:
            bits = 8 if frames.dtype == np.uint8 else 10
            wide = frames.astype(np.uint16)
            frames = (wide << (16 - bits)) | (wide >> (2 * bits - 16))  # white stays white
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(frames).tobytes())
        except (BrokenPipeError, OSError):
            raise UserError(f"cannot write {self.path}: {self._message()}") from None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the process is gone; its exit status says so
            self._process.stdin.close()
        if kind is not None:
            self._process.kill()
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
