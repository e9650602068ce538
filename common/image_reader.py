"""Frames of image files, like those of common/video_reader.py: a sequence, a still or an animation (WebP)."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from common.errors import UserError
from common.exr import exr_header, is_exr
from common.image_files import check_sizes, header, read_image, upright_size
from common.video_probe import VideoInfo

#: frames per second of a sequence where nothing else is said, FFmpeg's own number
SEQUENCE_RATE = Fraction(25)
#: unit of the times of an animation, seconds
MILLISECOND = Fraction(1, 1000)
#: what browsers show a frame for that asks for less than a hundredth of a second, ms
SHORTEST_MS, SHORT_MS = 10, 100


class Images:
    """Image files that are the frames of one video."""

    def __init__(self, given: Path, paths: Sequence[Path], frame_rate: Fraction | None = None) -> None:
        """
        Args:
            given: what was asked for; named in messages.
            paths: the files in order; a single one may be an animation.
            frame_rate: of a sequence; an animation has its own times.

        Raises:
            UserError: a file is no image, or has another size than the first.
        """
        self.given, self.paths = given, list(paths)
        #: of each frame of an animation, ms; empty for other files
        self.durations_ms: list[int] = []
        #: it names colours of its own
        self.profile = False
        #: it holds linear light
        self.linear = is_exr(paths[0])
        if self.linear:
            width, height, alpha = exr_header(paths[0])
            size = width, height
        else:
            with header(paths[0]) as image:
                size = upright_size(image)
                self.durations_ms = _durations_ms(image) if len(paths) == 1 else []
                alpha = "A" in image.getbands() or "transparency" in image.info
                self.profile = bool(image.info.get("icc_profile"))
        check_sizes(self.paths, size)
        frames = len(self.durations_ms) or len(paths)
        rate = frame_rate or SEQUENCE_RATE
        seconds = frames / rate
        if self.durations_ms:
            seconds = sum(self.durations_ms) * MILLISECOND
            rate = frames / seconds
        bits = 8 if self.durations_ms else 8 * read_image(paths[0], deep=True).itemsize
        self.info = VideoInfo(
            *size,
            rate,
            frames,
            float(seconds),
            Fraction(1),
            (),
            alpha=alpha,
            bits=bits,
            end_s=float(seconds),
            alpha_is_read=alpha and not self.linear,
        )

    @property
    def still(self) -> bool:
        """One image."""
        return self.info.frames == 1


class ImageReader:
    """Iterates over frames, each (H, W, 3) RGB, uint8 or uint16 in 0…65535; the attributes are `VideoReader`'s.

    An image that cannot be decoded is an error, and the one before it is repeated in its place.
    """

    def __init__(
        self,
        images: Images,
        start: int = 0,
        frames: int | None = None,
        *,
        size: tuple[int, int] | None = None,
        frame_rate: Fraction | None = None,
        bits: Literal[8, 16] = 8,
        alpha: bool = False,
    ) -> None:
        """
        Args:
            start, frames: as for `VideoReader`.
            size: (width, height) that images are shrunk to, by the mean of the pixels that each new one covers.
            frame_rate: an animation's frames are repeated and dropped to it; a sequence has it already.
            alpha: frames are (H, W, 4) RGBA.
        """
        self.path: str | Path = images.given
        self.info = images.info
        self._images, self._size, self._bits, self._alpha = images, size, bits, alpha
        self.pts: list[int | None] = []
        self.errors: list[str] = []
        self.count = 0
        shown = _shown(images, frame_rate)
        own_times = bool(images.durations_ms) and frame_rate is None
        #: seconds of one unit of `pts`
        self.time_base = MILLISECOND if own_times else 1 / (frame_rate or images.info.frame_rate)
        end = None if frames is None else start + frames
        self._shown = shown[start:end]
        #: how long the last frame is shown, in the unit of `pts`
        self.last_duration = images.durations_ms[-1] if own_times else 1

    def __iter__(self) -> Iterator[np.ndarray]:
        frame: np.ndarray | None = None
        for pts, pixels in self._pixels():
            if pixels is not None:
                frame = self._fit(pixels)
            elif frame is None:
                frame = self._fit(np.zeros((self.info.height, self.info.width, 4 if self._alpha else 3), np.uint8))
            self.count += 1
            self.pts.append(pts)
            yield frame

    def checksum(self, index: int) -> None:
        """An image is found by its number."""
        return None

    def _pixels(self) -> Iterator[tuple[int, np.ndarray | None]]:
        if self._images.durations_ms:
            yield from self._animation()
            return
        pixels: np.ndarray | None
        for number, pts in self._shown:
            path = self._images.paths[number]
            try:
                pixels = read_image(path, deep=self.info.bits > 8, alpha=self._alpha)
                if pixels.shape[:2] != (self.info.height, self.info.width):
                    raise UserError(f"{path} has another size than its header says")
            except UserError as error:
                self.errors.append(str(error))
                pixels = None
            yield pts, pixels

    def _animation(self) -> Iterator[tuple[int, np.ndarray | None]]:
        """Frames of a WebP build on those before, so that all are decoded, once."""
        wanted: dict[int, list[int]] = {}
        for number, pts in self._shown:
            wanted.setdefault(number, []).append(pts)
        with header(self._images.paths[0]) as image:
            for number in range(max(wanted, default=-1) + 1):
                try:
                    image.seek(number)
                    pixels: np.ndarray | None = np.array(image.convert("RGBA" if self._alpha else "RGB"))
                except (OSError, EOFError) as error:
                    self.errors.append(f"frame {number}: {error}")
                    pixels = None
                for pts in wanted.get(number, ()):
                    yield pts, pixels

    def _fit(self, pixels: np.ndarray) -> np.ndarray:
        if self._bits == 16 and pixels.dtype == np.uint8:
            pixels = pixels.astype(np.uint16) * 257
        elif self._bits == 8 and pixels.dtype == np.uint16:
            pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if self._size and self._size != (self.info.width, self.info.height):
            pixels = cv2.resize(pixels, self._size, interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(pixels)


def _durations_ms(image: Image.Image) -> list[int]:
    """Of each frame of an animation; empty for a still."""
    count = getattr(image, "n_frames", 1) if image.format == "WEBP" else 1
    durations = []
    for number in range(count if count > 1 else 0):
        image.seek(number)
        image.load()  # WebP tells a duration only then
        duration = round(image.info.get("duration", 0))
        durations.append(duration if duration > SHORTEST_MS else SHORT_MS)
    return durations


def _shown(images: Images, frame_rate: Fraction | None) -> list[tuple[int, int]]:
    """(number of the image, time stamp) of each frame that is given out."""
    if not images.durations_ms:
        return [(number, number) for number in range(len(images.paths))]
    starts = [0, *accumulate(images.durations_ms)]
    if frame_rate is None:
        return [(number, start) for number, start in enumerate(starts[:-1])]
    count = max(1, round(starts[-1] * MILLISECOND * frame_rate))
    times_ms = [number / frame_rate / MILLISECOND for number in range(count)]
    return [(min(bisect.bisect_right(starts, time) - 1, len(starts) - 2), pts) for pts, time in enumerate(times_ms)]
