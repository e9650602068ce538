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
        while not self._header.endswith(b"\n"):
            byte = os.read(descriptor, 1)
            if not byte or len(self._header) > LONGEST_HEADER:
                raise UserError(f"{name} holds no y4m video; {_REMEDY}")
            self._header += byte
        self.info = _info(self._header.decode("ascii", errors="replace"), name)

    def feed(self, destination: IO[bytes]) -> threading.Thread:
        """Start a thread that writes the header and all that follows, until either side ends."""

        def copy() -> None:
            with suppress(OSError, ValueError):
                chunk = self._header
                while chunk:
                    destination.write(chunk)
                    chunk = os.read(self._descriptor, _CHUNK)
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
        )
    except (ValueError, KeyError, ZeroDivisionError):
        raise UserError(f"{name} holds no y4m video (it begins with {header[:40]!r}); {_REMEDY}") from None


def _ratio(text: str) -> Fraction:
    """`30000:1001`; 0 where it is 0:0, not known."""
    numerator, denominator = (int(number) for number in text.split(":"))
    return Fraction(0) if denominator == 0 else Fraction(numerator, denominator)
