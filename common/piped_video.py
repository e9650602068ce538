"""Video on standard input: YUV4MPEG2 (y4m), raw frames after one line that says their size, rate and format."""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from fractions import Fraction
from typing import IO

from common.errors import UserError
from common.video_probe import VideoInfo

#: a header is one line; anything longer is none, bytes
LONGEST_HEADER = 1024
_CHUNK = 1 << 20
_FRAME = b"FRAME\n"
#: samples of a frame for each pixel: of chroma and alpha beside one of luma
_CHROMA = {"420": (2, 2), "411": (4, 1), "422": (2, 1), "444": (1, 1)}
_REMEDY = "pipe `ffmpeg -i in.mp4 -f yuv4mpegpipe -`"


class PipedVideo:
    """A video that can be read once."""

    def __init__(self, descriptor: int = 0, name: str = "standard input") -> None:
        """Read the header.

        Args:
            descriptor: of the file to read from; it is left open.

        Raises:
            UserError: no y4m header.
        """
        self.name = name
        self._descriptor = descriptor
        self._header = b""
        #: the last frame was not complete; known after it
        self.cut_short = False
        while not self._header.endswith(b"\n"):
            byte = os.read(descriptor, 1)
            if not byte or len(self._header) > LONGEST_HEADER:
                raise UserError(f"{name} holds no y4m video; {_REMEDY}")
            self._header += byte
        text = self._header.decode("ascii", errors="replace")
        self.info = _info(text, name)
        self._frame_bytes = len(_FRAME) + _bytes_of_frame(self.info, text)

    def feed(self, destination: IO[bytes]) -> threading.Thread:
        """Start a thread that writes the header and all that follows, until either side ends."""

        def copy() -> None:
            with suppress(OSError, ValueError):
                chunk, read = self._header, -len(self._header)
                while chunk:
                    destination.write(chunk)
                    read += len(chunk)
                    chunk = os.read(self._descriptor, _CHUNK)
                self.cut_short = read % self._frame_bytes != 0
            with suppress(OSError, ValueError):
                destination.close()

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        return thread


def _info(header: str, name: str) -> VideoInfo:
    magic, *fields = header.split()
    values = {field[0]: field[1:] for field in fields if field[0] != "X"}
    try:
        if magic != "YUV4MPEG2":
            raise ValueError(magic)
        rate = _ratio(values.get("F", "25:1"))
        pixel_format = values.get("C", "420jpeg")
        depth = re.search(r"(?:p|mono)(\d+)$", pixel_format)
        return VideoInfo(
            int(values["W"]),
            int(values["H"]),
            rate or Fraction(25),
            None,
            None,
            _ratio(values.get("A", "1:1")) or Fraction(1),
            (),
            interlaced=values.get("I", "p") not in ("p", "?"),
            alpha="alpha" in pixel_format,
            bits=int(depth[1]) if depth else 8,
            chroma=not pixel_format.startswith("mono"),
        )
    except (ValueError, KeyError, ZeroDivisionError):
        raise UserError(f"{name} holds no y4m video (it begins with {header[:40]!r}); {_REMEDY}") from None


def _bytes_of_frame(info: VideoInfo, header: str) -> int:
    """Of its samples; a line of few bytes comes before them."""
    pixel_format = next((field[1:] for field in header.split()[1:] if field[0] == "C"), "420jpeg")
    luma = info.width * info.height
    samples = luma
    if (ratio := _CHROMA.get(pixel_format[:3])) is not None:
        samples += 2 * -(-info.width // ratio[0]) * -(-info.height // ratio[1])
    samples += luma if info.alpha else 0
    return samples * (1 if info.bits == 8 else 2)


def _ratio(text: str) -> Fraction:
    """`30000:1001`; 0 where it is 0:0, not known."""
    numerator, denominator = (int(number) for number in text.split(":"))
    return Fraction(0) if denominator == 0 else Fraction(numerator, denominator)
