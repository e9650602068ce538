"""Video files in and out through FFmpeg: frames stream, sound and frame rate are kept.

Frames are uint8 RGB. The FFmpeg program is the one in the wheel `imageio-ffmpeg`, the same version everywhere; another
one is chosen by the environment variable DUO_VSR_FFMPEG.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import av
import ffmpeg
import imageio_ffmpeg
import numpy as np
from av.error import FFmpegError

from common.atomic import atomic_file
from common.errors import UserError

MP4_AUDIO = frozenset({"aac", "mp3", "mp3float", "ac3", "eac3", "alac", "opus", "flac"})
#: sound that a container takes unchanged; any other is encoded anew
COPIED_AUDIO = {".mp4": MP4_AUDIO, ".m4v": MP4_AUDIO, ".mov": MP4_AUDIO, ".webm": frozenset({"opus", "vorbis"})}
#: containers that take what is written here
OUTPUT_SUFFIXES = (".mp4", ".mkv", ".mov", ".m4v", ".avi")
#: files that are looked for as videos
VIDEO_SUFFIXES = (
    *(".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".y4m"),
    *(".m2ts", ".mts", ".vob", ".mxf", ".3gp", ".ogv"),
)
#: the variable that names another FFmpeg program than the bundled one
FFMPEG_VARIABLE = "DUO_VSR_FFMPEG"

Quality = Literal["lossy", "lossless"]


@dataclass(frozen=True)
class VideoInfo:
    """What is known before the first frame is decoded."""

    width: int
    height: int
    frame_rate: Fraction
    #: None where the container does not say
    frames: int | None
    #: None where the container does not say
    duration_s: float | None
    #: of one pixel; not 1 for most DVDs
    sample_aspect_ratio: Fraction
    #: codec of each sound track
    audio_codecs: tuple[str, ...]

    @property
    def estimated_frames(self) -> int | None:
        """For progress bars: what the header says, or duration times rate."""
        if self.frames or self.duration_s is None:
            return self.frames
        return round(self.duration_s * self.frame_rate)


def ffmpeg_binary() -> str:
    """Path of the FFmpeg program.

    Raises:
        UserError: DUO_VSR_FFMPEG names no program.
    """
    chosen = os.environ.get(FFMPEG_VARIABLE)
    if not chosen:
        return imageio_ffmpeg.get_ffmpeg_exe()
    found = shutil.which(chosen)
    if found is None:
        raise UserError(f"{FFMPEG_VARIABLE}={chosen}: no such program; unset it to use the bundled FFmpeg")
    return found


def probe(path: str | Path) -> VideoInfo:
    """Read the header and the first frame; width and height are those of the picture turned upright.

    Raises:
        UserError: no such file, or not a video.
    """
    if not Path(path).is_file():
        raise UserError(f"no video file {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.base_rate or Fraction(25)
            audio_codecs = tuple(track.codec_context.name for track in container.streams.audio)
            first = next(container.decode(stream), None)
            if first is None:
                raise UserError(f"{path} holds no frame that can be decoded; convert it or leave it out")
            # FFmpeg turns what a phone recorded on its side, and swaps the sides with it.
            width, height = (first.width, first.height) if first.rotation % 180 == 0 else (first.height, first.width)
            return VideoInfo(
                width,
                height,
                Fraction(rate),
                stream.frames or None,
                container.duration / av.time_base if container.duration else None,
                Fraction(stream.sample_aspect_ratio or 1),
                audio_codecs,
            )
    except FFmpegError as error:
        raise UserError(f"{path} is not a readable video ({error.strerror}); convert it or leave it out") from None


def read_frames(
    path: str | Path, start: int = 0, frames: int | None = None, size: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """Stream frames, each uint8 (H, W, 3) RGB, from frame number `start` on.

    Args:
        size: (width, height) that frames are resized to, by the mean of the pixels that each new one covers.

    Raises:
        UserError: not a video, or the file breaks off while it is decoded.
    """
    info = probe(path)
    trim: dict[str, int] = {"start_frame": start}
    if frames is not None:
        trim["end_frame"] = start + frames
    stream = ffmpeg.input(str(path)).video.filter("trim", **trim).filter("setpts", "PTS-STARTPTS")
    width, height = size or (info.width, info.height)
    if (width, height) != (info.width, info.height):
        stream = stream.filter("scale", width, height, flags="area+accurate_rnd")
    stream = stream.output("pipe:", format="rawvideo", pix_fmt="rgb24", fps_mode="passthrough")
    command = stream.global_args("-loglevel", "error", "-nostdin").compile(cmd=ffmpeg_binary())
    frame_bytes = width * height * 3
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        count = 0
        try:
            while len(raw := process.stdout.read(frame_bytes)) == frame_bytes:
                count += 1
                yield np.frombuffer(raw, np.uint8).reshape(height, width, 3)
            finished = process.wait() == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        log.seek(0)
        message = " ".join(log.read().decode(errors="replace").split())[:300]
        lost = bool(message) and frames is None and info.frames is not None and count < info.frames - start
        if not finished or lost or (count == 0 and frames != 0):
            raise UserError(f"{path} breaks off after {count} frames: {message or 'no more frames'}")


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
        crf: int = 15,
        bit_depth: Literal[8, 10] = 8,
        sample_aspect_ratio: Fraction = Fraction(1),
        codec: str = "libx264",
        preset: str = "medium",
        size: tuple[int, int] | None = None,
    ) -> None:
        """
        Args:
            width: of the frames, px.
            height: of the frames, px.
            size: (width, height) that is written, by a Lanczos filter; None: the frames' own.
            quality: lossless is x264 RGB at quantiser 0.
            crf: constant rate factor of lossy files; 15 is visually lossless.
            bit_depth: 10 writes yuv420p10 and takes uint16 frames holding 10-bit values as well as uint8.

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
            source = source.filter("scale", *written, flags="lanczos+accurate_rnd+full_chroma_int")
        options: dict[str, Any] = {"preset": preset}
        if quality == "lossless":
            options |= {"vcodec": "libx264rgb", "qp": 0, "pix_fmt": "rgb24"}
        else:
            options |= {"vcodec": codec, "crf": crf, "pix_fmt": "yuv420p10le" if self._wide else "yuv420p"}
            options |= {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"}
            source = source.filter("scale", out_color_matrix="bt709", out_range="tv")
            if written[0] % 2 or written[1] % 2:  # 4:2:0 needs even sides
                source = source.filter("pad", written[0] + written[0] % 2, written[1] + written[1] % 2)
        if sample_aspect_ratio != 1:
            source = source.filter("setsar", str(sample_aspect_ratio))
        if self.path.suffix.lower() in (".mp4", ".mov", ".m4v"):
            options["movflags"] = "+faststart"
        output = ffmpeg.output(source, str(temporary), **options).overwrite_output()
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
        return _reason(self._log.read())


def join(parts: Sequence[Path], path: Path, audio_from: str | Path | None = None) -> None:
    """Put the pictures of `parts`, written alike, one after the other into `path`, without encoding them again.

    Args:
        parts: files of one folder.
        audio_from: file whose sound tracks are kept: copied where the new container takes them, else encoded anew.

    Raises:
        UserError: `path` cannot be written.
    """
    names = parts[0].with_name(".parts.txt")
    options: dict[str, Any] = {"vcodec": "copy"}
    tracks = probe(audio_from).audio_codecs if audio_from is not None else ()
    streams = [ffmpeg.input(str(names), format="concat", safe=0).video]
    if tracks:
        streams.append(ffmpeg.input(str(audio_from)).audio)
        if set(tracks) <= COPIED_AUDIO.get(path.suffix.lower(), frozenset(tracks)):
            options["acodec"] = "copy"
    if path.suffix.lower() in (".mp4", ".mov", ".m4v"):
        options["movflags"] = "+faststart"
    names.write_text("".join(f"file {part.name}\n" for part in parts))
    with atomic_file(path) as temporary:
        output = ffmpeg.output(*streams, str(temporary), **options).overwrite_output()
        command = output.global_args("-loglevel", "error", "-nostdin").compile(cmd=ffmpeg_binary())
        done = subprocess.run(command, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            raise UserError(f"cannot write {path}: {_reason(done.stderr)}")


def _reason(log: bytes) -> str:
    text = " ".join(log.decode(errors="replace").split())
    if re.search(r"no space left", text, re.IGNORECASE):
        return "the disk is full; free space or choose another folder"
    return text[:300] or "FFmpeg stopped"
