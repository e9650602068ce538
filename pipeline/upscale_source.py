"""What is upscaled: a video file, image files or standard input, all read in the same way."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from common.image_files import find_images, is_pattern, missing_numbers
from common.image_reader import ImageReader, Images
from common.piped_video import PipedVideo
from common.video_probe import VideoInfo, probe
from common.video_reader import Deinterlace, Mark, ToneMap, VideoReader

#: names standard input and standard output
PIPE = Path("-")


class FrameReader(Protocol):
    """What `VideoReader` and `ImageReader` have in common."""

    path: str | Path
    time_base: Fraction
    pts: list[int | None]
    last_duration: int
    errors: list[str]
    count: int

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def checksum(self, index: int) -> int | None: ...


@dataclass(frozen=True)
class Source:
    """One input."""

    #: as it was given
    path: Path
    info: VideoInfo
    images: Images | None = None
    piped: PipedVideo | None = None

    @property
    def file(self) -> Path | None:
        """The video file, which may hold other tracks; None for images and standard input."""
        return None if self.images or self.piped else self.path

    @property
    def files(self) -> list[Path]:
        """All that is read, and must not be overwritten."""
        return self.images.paths if self.images else [] if self.piped else [self.path]

    @property
    def name(self) -> str:
        """For messages."""
        return self.piped.name if self.piped else self.path.name

    def state(self) -> str:
        """Changes with the content; that of standard input is never the same again."""
        if self.piped:
            return f"standard input of process {os.getpid()} at {time.time_ns()}"
        if self.images is None or len(self.files) == 1:
            return file_state(self.files[0])
        states = hashlib.sha256("\n".join(map(file_state, self.files)).encode(errors="surrogateescape"))
        return f"{len(self.files)} images of {self.path.resolve()} with the hash {states.hexdigest()[:16]}"

    def said(self) -> list[str]:
        """How images are understood, for the user."""
        if self.images is None:
            return []
        lines = []
        if len(self.files) > 1:
            first, last, rate = self.files[0].name, self.files[-1].name, float(self.info.frame_rate)
            lines.append(
                f"{len(self.files)} images, {first} to {last}, are one sequence at {rate:.6g} frames/s; "
                "--fps changes the rate, --stills upscales the images of a folder one by one"
            )
            if is_pattern(self.path) and not self.path.exists() and (missing := missing_numbers(self.path)):
                lines.append(f"{missing} numbers between the first and the last are missing; the rest is one sequence")
        if self.images.linear:
            lines.append(
                "EXR: linear light is seen through the sRGB curve, primaries are taken as BT.709; what is below 0 or "
                "above 1 is clipped"
            )
        if self.images.profile:
            lines.append("its colour profile is left out: pixels are taken as sRGB")
        return lines

    def reader(
        self,
        start: int,
        frames: int | None,
        *,
        size: tuple[int, int],
        frame_rate: Fraction | None,
        deinterlace: Deinterlace,
        bits: Literal[8, 16],
        mark: Mark | None = None,
        alpha: bool = False,
        tone_map: ToneMap | None = None,
    ) -> FrameReader:
        """Frames from `start` on; arguments as for `VideoReader`."""
        if self.images:
            return ImageReader(self.images, start, frames, size=size, frame_rate=frame_rate, bits=bits, alpha=alpha)
        return VideoReader(
            self.path, start, frames, size=size, frame_rate=frame_rate, deinterlace=deinterlace, bits=bits,
            piped=self.piped, mark=mark, alpha=alpha, tone_map=tone_map,
        )  # fmt: skip


def open_source(path: Path, frame_rate: Fraction | None = None) -> Source:
    """
    Args:
        path: a video, an image, a folder or pattern of images, or PIPE.
        frame_rate: of a sequence of images.

    Raises:
        UserError: it is none of them.
    """
    if path == PIPE:
        piped = PipedVideo()
        return Source(path, piped.info, piped=piped)
    paths = find_images(path)
    if paths is None:
        return Source(path, probe(path))
    images = Images(path, paths, frame_rate)
    return Source(path, images.info, images=images)


def file_state(path: Path) -> str:
    """Name, size and time of change."""
    state = path.stat()
    return f"{path.resolve()} of {state.st_size} bytes at {state.st_mtime_ns}"
