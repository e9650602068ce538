"""Frames of a video, through FFmpeg: they stream, each with its time.

An untagged video is decoded as BT.709 from 1280 px of width or 720 lines on and as BT.601 below; chroma is enlarged
exactly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Literal

import ffmpeg
import numpy as np

from common.bit_depth import from_swscale, pipe_format
from common.errors import UserError
from common.piped_video import PipedVideo
from common.video_probe import BT709, UNSPECIFIED, Colour, ffmpeg_binary, probe, untagged_matrix, url

Deinterlace = Literal["auto", "bwdif", "off", "detelecine", "tff", "bff"]
ToneMap = Literal["hable", "mobius", "reinhard"]

#: SDR white, cd/m², from which FFmpeg's tone curves count
SDR_WHITE = 100
#: brightest pixel of HDR that does not say it, cd/m² (the usual mastering display)
USUAL_PEAK = 1000

#: seconds before a mark to which FFmpeg seeks: a filter that looks at the frames before has them [ours]
SEEK_MARGIN_S = 1
#: of a frame's rows, one in so many counts for its checksum
CHECKED_ROWS = 8

#: rounding and interpolation without swscale's short cuts, which shift chroma and darken by a level
EXACT = "accurate_rnd+full_chroma_int+full_chroma_inp"

_TIME_BASE = re.compile(rb"showinfo.*config in time_base: (\d+)/(\d+)")
_FRAME = re.compile(rb"showinfo.*\] n: *\d+ pts: *(-?\d+|NOPTS) (?:.*? duration: *(\d+))?")
_ERROR = re.compile(rb"^(?:\[[^\]]* @ 0x[0-9a-f]+\] )*\[(?:error|fatal|panic)\] ?(.*)")
#: errors of the pipe that the frames come through, not of the file
_OURS = re.compile(rb"^\[(?:rawvideo|out#)")


@dataclass(frozen=True)
class Mark:
    """A frame that was read before, so that it can be found again without decoding all before it."""

    pts: int
    #: seconds of one unit of `pts`
    time_base: Fraction
    #: of its pixels (`VideoReader.checksum`)
    checksum: int


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
        piped: PipedVideo | None = None,
        mark: Mark | None = None,
        alpha: bool = False,
        tone_map: ToneMap | None = None,
    ) -> None:
        """
        Args:
            start: number of the first frame, after `frame_rate` and `deinterlace`.
            frames: how many; None: all.
            size: (width, height) that frames are resized to, by the mean of the pixels that each new one covers.
            frame_rate: frames are repeated and dropped to this constant rate; None: all, with the times they have.
            deinterlace: bwdif, or auto: bwdif for the frames that are marked as interlaced; detelecine: four frames of
                24 a second out of five that a 3:2 pulldown made of them; tff, bff: bwdif for all frames, the upper or
                the lower field first, whatever they are marked as.
            bits: 16 for videos of more than 8 bits.
            piped: read this instead of the file `path`, once.
            mark: the first frame as an earlier reader saw it; FFmpeg seeks to it. Where it does not come out the same,
                or the file is damaged before it, all is decoded from the beginning.
            alpha: frames are (H, W, 4) RGBA.
            tone_map: HDR becomes BT.709 by this curve; other videos stay as they are.
        """
        self.path, self._start, self._limit = path, start, frames
        self._kind: type = np.uint8 if bits == 8 else np.uint16
        self._channels = 4 if alpha else 3
        self._pixel_format = pipe_format(bits, alpha=alpha)
        self._piped = piped
        self.info = piped.info if piped else probe(path)
        self.width, self.height = size or (self.info.width, self.info.height)
        self._tone_map = tone_map if self.info.colour.hdr else None
        #: seconds of one unit of `pts`
        self.time_base = Fraction(1)
        #: time stamp of each frame that was given out, as in the file
        self.pts: list[int | None] = []
        #: how long the last frame is shown, in the same unit; 0: not known
        self.last_duration = 0
        #: FFmpeg's errors so far
        self.errors: list[str] = []
        self.count = 0
        self._checksums: list[int] = []
        self._frame_rate, self._deinterlace = frame_rate, deinterlace
        # What a constant rate or a pulldown makes of a frame depends on all frames before.
        seeks = frame_rate is None and deinterlace != "detelecine" and piped is None
        self._mark = mark if seeks else None

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._mark is not None:
            frames = self._decode(self._mark)
            first = next(frames, None)
            if first is not None and not self.errors and self._is_marked(self._mark):
                yield first
                yield from frames
                return
            frames.close()
            self.pts, self._checksums, self.errors, self.count = [], [], [], 0
        yield from self._decode(None)

    def checksum(self, index: int) -> int | None:
        """Of a frame that was given out, counted from 0; None where reading cannot begin with it."""
        return self._checksums[index] if self._frame_rate is None and self._piped is None else None

    def _is_marked(self, mark: Mark) -> bool:
        """Whether the first frame is the one of the mark."""
        seen = (self.pts[:1], self.time_base, self._checksums[0])
        return seen == ([mark.pts], mark.time_base, mark.checksum)

    def _decode(self, mark: Mark | None) -> Generator[np.ndarray]:
        shape = (self.height, self.width, self._channels)
        with tempfile.NamedTemporaryFile() as log, open(log.name, "rb") as lines:
            stdin = subprocess.PIPE if self._piped else None
            process = subprocess.Popen(self._compile(mark), stdin=stdin, stdout=subprocess.PIPE, stderr=log)
            assert process.stdout is not None
            if self._piped:
                assert process.stdin is not None
                self._piped.feed(process.stdin)
            try:
                while process.stdout.readinto(frame := np.empty(shape, self._kind)) == frame.nbytes:  # type: ignore
                    self.count += 1
                    if self._kind is np.uint16 and self.info.chroma and not self._tone_map:
                        from_swscale(frame)
                    self._checksums.append(zlib.crc32(frame[::CHECKED_ROWS].tobytes()))
                    self._read_log(lines)
                    yield frame
                failed = process.wait() != 0
                self._read_log(lines)
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
        if self._piped and self._piped.cut_short:
            self.errors.append("it ends within a frame")
        if (failed or self.count == 0) and not self.errors and self._limit != 0:
            self.errors.append("no more frames")

    @property
    def lost_frames(self) -> int:
        """Frames that the header promises and that did not come; 0 where it promises nothing."""
        if self._limit is not None or self.info.frames is None:
            return 0
        return max(0, self.info.frames - self._start - self.count)

    def _compile(self, mark: Mark | None) -> list[str]:
        frame_rate, deinterlace = self._frame_rate, self._deinterlace
        start = {"start_frame": self._start} if mark is None else {"start_pts": mark.pts}
        # Without reinit_filter=0, frames would be counted anew where their size changes.
        source: dict[str, Any] = {"filename": "pipe:0", "format": "yuv4mpegpipe"}
        if not self._piped:
            source = {"filename": url(self.path)}
        if mark is not None:  # to the key frame before; `start` leaves out what comes before the mark
            source["ss"] = f"{float(mark.pts * mark.time_base) - SEEK_MARGIN_S:.6f}"
            source |= {"seek_timestamp": 1, "noaccurate_seek": None}
        stream = ffmpeg.input(**source, reinit_filter=0)[str(self.info.stream_index)]
        marked = self.info.interlaced or self.info.may_turn_interlaced  # frames that are not marked pass unchanged
        if deinterlace == "bwdif" or (deinterlace == "auto" and marked):
            which = "interlaced" if deinterlace == "auto" else "all"
            stream = stream.filter("bwdif", mode="send_frame", deint=which)
        if deinterlace in ("tff", "bff"):
            stream = stream.filter("bwdif", mode="send_frame", deint="all", parity=deinterlace)
        if deinterlace == "detelecine":
            # Fields of neighbours are matched, what still combs is deinterlaced, the doubled one of five frames goes.
            stream = stream.filter("fieldmatch", combmatch="full")
            stream = stream.filter("bwdif", mode="send_frame", deint="interlaced").filter("decimate")
        if frame_rate is not None:
            stream = stream.filter("fps", f"{frame_rate.numerator}/{frame_rate.denominator}")
        stream = stream.filter("trim", **start)
        if self._limit is not None:
            stream = stream.filter("trim", end_frame=self._limit)
        stream = stream.filter("showinfo", checksum=0)
        if self._tone_map:
            stream = _mapped(stream, self._tone_map, self.info.colour)
        resized = (self.width, self.height) != (self.info.width, self.info.height)
        flags = f"{'area' if resized else 'bicubic'}+{EXACT}"
        stream = stream.filter("scale", self.width, self.height, flags=flags, **self._matrix())
        stream = stream.filter("format", self._pixel_format)
        output = stream.output("pipe:", format="rawvideo", pix_fmt=self._pixel_format, fps_mode="passthrough")
        # With copyts, times are those of the file: FFmpeg counts from the first stream of some containers and from the
        # video of others. A constant rate begins at the first frame, and there FFmpeg has to mend times that restart.
        absolute = () if frame_rate is not None else ("-copyts",)
        quiet = ("-hide_banner", "-nostdin", "-nostats", *absolute, "-loglevel", "repeat+level+info")
        return list(output.global_args(*quiet).compile(cmd=ffmpeg_binary()))

    def _matrix(self) -> dict[str, str]:
        """What an untagged video is decoded with; a tagged one says it itself."""
        if self._tone_map or self.info.colour.matrix != UNSPECIFIED:
            return {}
        matrix = untagged_matrix(self.info.width, self.info.height)
        return {"in_color_matrix": "bt709" if matrix == BT709 else "smpte170m"}

    def _read_log(self, log: IO[bytes]) -> None:
        while (line := log.readline()).endswith(b"\n"):
            if frame := _FRAME.search(line):
                self.pts.append(None if frame[1] == b"NOPTS" else int(frame[1]))
                self.last_duration = int(frame[2] or 0)
            elif base := _TIME_BASE.search(line):
                self.time_base = Fraction(int(base[1]), int(base[2]))
            elif (error := _ERROR.search(line)) and not _OURS.search(line):
                self.errors.append(error[1].decode(errors="replace").strip()[:300])
        log.seek(-len(line), 1)  # FFmpeg is in the middle of this one


def check_tone_map(tone_map: ToneMap) -> None:
    """
    Raises:
        UserError: the FFmpeg program lacks a filter for it.
    """
    filters = subprocess.run([ffmpeg_binary(), "-hide_banner", "-filters"], capture_output=True, text=True, check=False)
    words = filters.stdout.split()
    if missing := [name for name in ("zscale", "tonemap") if name not in words]:
        raise UserError(
            f"--tone-map {tone_map}: this FFmpeg has no {' and no '.join(missing)} filter; the bundled one has"
        )


def _mapped(stream: Any, curve: ToneMap, colour: Colour) -> Any:
    """HDR frames as BT.709, RGB of 16 bits."""
    display_peak = float(colour.mastering.luminance[1]) if colour.mastering else USUAL_PEAK
    peak = (colour.light_level and colour.light_level[0]) or display_peak  # 0 stands for unknown
    untagged = {"matrixin": "2020_ncl"} if colour.matrix == UNSPECIFIED else {}
    untagged |= {"primariesin": "2020", "primaries": "2020"} if colour.primaries == UNSPECIFIED else {}
    # Without agamma=0, HLG's system gamma goes to each component instead of their luminance, and colours change.
    stream = stream.filter("zscale", transfer="linear", npl=SDR_WHITE, agamma=0, **untagged)
    stream = (
        stream.filter("format", "gbrpf32le")
        .filter("zscale", primaries="709")
        .filter("tonemap", curve, desat=0, peak=peak / SDR_WHITE)
    )
    return stream.filter("zscale", transfer="709", matrix="gbr", range="full").filter("format", "gbrp16le")


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
