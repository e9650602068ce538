"""What a video file holds, before its frames are decoded; and the FFmpeg program that decodes them.

The FFmpeg program is the one in the wheel `imageio-ffmpeg`, the same version everywhere; another one is chosen by the
environment variable DUO_VSR_FFMPEG.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
from av.error import FFmpegError

from common.errors import UserError

#: files that are looked for as videos
VIDEO_SUFFIXES = (
    *(".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".y4m"),
    *(".m2ts", ".mts", ".vob", ".mxf", ".3gp", ".ogv"),
)
#: how the names of AppleDouble files begin, in which macOS keeps the attributes of the file of the same name
APPLE_DOUBLE = "._"
#: the variable that names another FFmpeg program than the bundled one
FFMPEG_VARIABLE = "DUO_VSR_FFMPEG"
#: a frame rate above it is a container's clock rather than a rate (webm as browsers record it: 1000)
LARGEST_RATE = 240
#: codecs whose first frames tell nothing: broadcasts and DVDs begin with progressive ones
INTERLACED_CODECS = frozenset({"mpeg2video", "dvvideo", "vc1"})
#: codecs of which recordings begin progressive and turn interlaced, as broadcasts do
TURNING_CODECS = frozenset({"h264", "mpeg4"})
#: width or height from which untagged video is high definition, hence BT.709
HD_WIDTH, HD_HEIGHT = 1280, 720

#: ITU-T H.273 codes, as FFmpeg numbers them
BT709, UNSPECIFIED, BT601, BT2020, BT2020_NCL, BT2020_CL, PQ, HLG = 1, 2, 6, 9, 9, 10, 16, 18

_FRAME_SHAPE = re.compile(
    r"showinfo.*\] n: *\d+ pts:.* sar:(?P<sar>\d+)/(?P<sar_den>\d+) s:(?P<width>\d+)x(?P<height>\d+)"
)
_DURATION = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class MasteringDisplay:
    """The display that HDR was graded on (SMPTE ST 2086)."""

    #: chromaticities x and y
    red: tuple[Fraction, Fraction]
    green: tuple[Fraction, Fraction]
    blue: tuple[Fraction, Fraction]
    white: tuple[Fraction, Fraction]
    #: darkest and brightest, cd/m²
    luminance: tuple[Fraction, Fraction]


@dataclass(frozen=True)
class Colour:
    """Codes of ITU-T H.273; UNSPECIFIED where the file does not say."""

    matrix: int = UNSPECIFIED
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    #: None where the first frame does not say all of it
    mastering: MasteringDisplay | None = None
    #: of the brightest pixel and of the brightest frame on average, cd/m²; None where the first frame does not say
    light_level: tuple[int, int] | None = None

    @property
    def hdr(self) -> bool:
        """Whether the transfer function is PQ or HLG."""
        return self.transfer in (PQ, HLG)


@dataclass(frozen=True)
class VideoInfo:
    """What is known before the second frame is decoded."""

    #: of the frame turned upright
    width: int
    height: int
    #: the average one; 25 where the container has none
    frame_rate: Fraction
    #: None where the container does not say
    frames: int | None
    #: None where the container does not say
    duration_s: float | None
    #: of one pixel; not 1 for most DVDs
    sample_aspect_ratio: Fraction
    #: codec of each sound track; None: nothing here decodes it
    audio_codecs: tuple[str | None, ...]
    colour: Colour = Colour()
    #: its first frame holds two fields of different times, or later ones may
    interlaced: bool = False
    #: its first frame is progressive, and later ones may not be
    may_turn_interlaced: bool = False
    #: it has a transparency channel
    alpha: bool = False
    #: of the video among the file's streams
    stream_index: int = 0
    #: of one component of a pixel
    bits: int = 8
    #: time stamp at which the file's first stream starts
    start_s: Fraction = Fraction(0)
    #: seconds from there to the end of the video; None where the container does not say
    end_s: float | None = None
    #: time stamp of the first frame
    first_s: Fraction = Fraction(0)
    #: its transparency comes with the frames that are read
    alpha_is_read: bool = False
    #: its pixels are luma and chroma
    chroma: bool = False

    @property
    def video_s(self) -> float | None:
        """Seconds from the first frame to the end of the video; sound may last longer. None: not known."""
        return self.duration_s if self.end_s is None else self.end_s - float(self.first_s - self.start_s)

    @property
    def estimated_frames(self) -> int | None:
        """For progress bars: what the header says, or duration times rate."""
        if self.frames or self.video_s is None:
            return self.frames
        return round(self.video_s * self.frame_rate)


def untagged_matrix(width: int, height: int) -> int:
    """BT709 for high definition and BT601 below; width and height are those of the frame turned upright."""
    return BT709 if width >= HD_WIDTH or height >= HD_HEIGHT else BT601


def named_like_a_video(name: str) -> bool:
    """By its suffix; AppleDouble files are none."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not os.path.basename(name).startswith(APPLE_DOUBLE)


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


def url(path: str | Path) -> str:
    """The path as FFmpeg takes it: without this, `12:30.mp4` names a protocol and `a#b` a part.

    Raises:
        UserError: the name is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path).encode(errors='backslashreplace').decode()}: rename it to UTF-8") from None
    return f"file:{path}"


def probe(path: str | Path) -> VideoInfo:
    """Read the header and the first frame; width and height are those of the frame turned upright.

    Raises:
        UserError: no such file, or not a video.
    """
    if not Path(path).is_file():
        exists = Path(path).exists()
        raise UserError(f"{path} is not a file; a pipe is read as -, in y4m" if exists else f"no video file {path}")
    try:
        with av.open(url(path)) as container:
            return _read(container, path)
    except FFmpegError as error:
        raise UserError(f"{path} is not a readable video ({error.strerror}); convert it or leave it out") from None


def count_frames(path: str | Path, info: VideoInfo, limit: int | None = None) -> int:
    """Frames that FFmpeg decodes, at most `limit`: a header may promise others. The video is decoded once.

    Raises:
        UserError: none.
    """
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", "-nostats", "-progress", "pipe:1", "-i", url(path)]
    command += ["-map", f"0:{info.stream_index}", "-fps_mode", "passthrough"]
    command += ["-frames:v", str(limit)] if limit is not None else []
    done = subprocess.run([*command, "-f", "null", "-"], capture_output=True, text=True, check=False)
    counts = re.findall(r"^frame=(\d+)", done.stdout, re.MULTILINE)
    if not counts or not int(counts[-1]):
        raise UserError(f"{path} holds no frame that FFmpeg decodes; convert it or leave it out")
    return int(counts[-1])


def first_video(container: Any) -> Any:
    """The stream that FFmpeg's `0:v:0` is, without a song's cover; None without any."""
    attached = av.stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & attached), None)


def _read(container: Any, path: str | Path) -> VideoInfo:
    stream = first_video(container)
    if stream is None:
        raise UserError(f"{path} holds no video stream")
    rate = stream.average_rate or stream.base_rate
    if rate is None or rate > LARGEST_RATE:
        rate = Fraction(25)
    first = _first_frame(container, stream)
    if first is None:
        raise UserError(f"{path} holds no frame that can be decoded; convert it or leave it out")
    if first.rotation % 90:
        raise UserError(f"{path} is to be shown turned by {first.rotation} degrees; only quarter turns are read")
    shown = _shown(path, stream.index)
    codec = stream.codec_context.name
    alpha = any(component.is_alpha for component in first.format.components)
    return VideoInfo(
        int(shown["width"]),
        int(shown["height"]),
        Fraction(rate),
        stream.frames or None,
        container.duration / av.time_base if container.duration else None,
        Fraction(int(shown["sar"]), max(1, int(shown["sar_den"]))) or Fraction(1),
        tuple(track.codec_context.name if track.codec_context else None for track in container.streams.audio),
        _colour(first),
        bool(first.interlaced_frame) or codec in INTERLACED_CODECS,
        codec in TURNING_CODECS and first.format.name.startswith("yuv"),
        alpha or stream.metadata.get("alpha_mode") == "1",  # VP8 and VP9 hold it beside the frames
        stream.index,
        max(component.bits for component in first.format.components),
        Fraction(container.start_time or 0, av.time_base),
        _end_s(container, stream),
        Fraction(0) if first.pts is None else first.pts * stream.time_base,
        alpha,
        len(first.format.components) >= 3 and not first.format.is_rgb,
    )


def _shown(path: str | Path, index: int) -> dict[str, str]:
    """Size and pixel shape of the first frame as FFmpeg gives it out: cropped and turned as the container asks."""
    command = [ffmpeg_binary(), "-hide_banner", "-nostdin", "-nostats", "-i", url(path), "-map", f"0:{index}"]
    command += ["-frames:v", "1", "-vf", "showinfo=checksum=0", "-f", "null", "-"]
    log = subprocess.run(command, stderr=subprocess.PIPE, check=False).stderr.decode(errors="replace")
    if (found := _FRAME_SHAPE.search(log)) is None:
        raise UserError(f"{path} holds no frame that FFmpeg decodes; convert it or leave it out")
    return found.groupdict()


def _first_frame(container: Any, stream: Any) -> Any:
    """The first frame that can be decoded: a capture may begin in the middle of a group of pictures."""
    for packet in container.demux(stream):
        try:
            if frames := packet.decode():
                return frames[0]
        except FFmpegError:
            continue
    return None


def _colour(frame: Any) -> Colour:
    """Tags of a frame, and what its side data says of the display it was made for."""
    held = {data.type.name: bytes(data) for data in frame.side_data}
    mastering = light_level = None
    if (data := held.get("MASTERING_DISPLAY_METADATA")) is not None:
        # AVMasteringDisplayMetadata: ten fractions, then whether chromaticities and luminances are set
        numbers = struct.unpack("=22i", data)
        if all(numbers[20:]) and all(numbers[1:20:2]):
            values = [Fraction(*numbers[place : place + 2]) for place in range(0, 20, 2)]
            mastering = MasteringDisplay(*zip(values[::2], values[1::2], strict=True))
    if (data := held.get("CONTENT_LIGHT_LEVEL")) is not None:
        light_level = struct.unpack("=2I", data)
    tags = int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc)
    return Colour(*tags, mastering, light_level)


def _end_s(container: Any, stream: Any) -> float | None:
    start_s = (container.start_time or 0) / av.time_base
    if stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - start_s
    if match := _DURATION.fullmatch(stream.metadata.get("DURATION", "")):  # Matroska's; its end, not its length
        return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) - start_s
    return None
