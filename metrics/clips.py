"""Clips from disk, one frame at a time: float32 (3, H, W) RGB in [0, 1]. A clip's length does not show in memory.

A clip is a video file, a folder of images (in natural order: 1, 2, 10) or a .npy array. Scores to be compared with
others' are taken before any lossy encode: images, .npy, or a lossless video such as FFV1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from common.fingerprint import file_sha256, files_fingerprint
from common.image_files import IMAGE_SUFFIXES, natural_order, read_image
from common.video_probe import VIDEO_SUFFIXES, count_frames, probe
from common.video_reader import read_frames
from metrics.frame_metric import ClipSize

#: integers use the whole range of their type, floats [0, 1]
Frame = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.floating]


class Clip(ABC):
    """One clip; its first `limit` frames where that is given."""

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.path, self.limit = path, limit

    @cached_property
    def size(self) -> ClipSize:
        """Frames, height and width; a video is decoded once for it."""
        frames, height, width = self._size()
        return ClipSize(frames if self.limit is None else min(frames, self.limit), height, width)

    def frames(self) -> Iterator[Tensor]:
        """Each frame, float32 (3, H, W) in [0, 1].

        Raises:
            UserError: the file cannot be read to its end.
        """
        for frame in self.read():
            yield to_tensor(frame[None])[0]

    def read(self) -> Iterator[Frame]:
        """The same frames as they lie in the file: (H, W, 3), uint8, uint16 or float in [0, 1]."""
        return islice(self._read(), self.limit)

    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return file_sha256(self.path)

    @abstractmethod
    def _size(self) -> tuple[int, int, int]:
        """Frames, height, width of the whole clip."""

    @abstractmethod
    def _read(self) -> Iterator[Frame]:
        """Frames of the whole clip, or more than `limit`."""


class _Video(Clip):
    def _size(self) -> tuple[int, int, int]:
        info = probe(self.path)
        return count_frames(self.path, info, self.limit), info.height, info.width

    def _read(self) -> Iterator[Frame]:
        return read_frames(self.path, frames=self.limit)


class _Images(Clip):
    @cached_property
    def files(self) -> list[Path]:
        return _visible(self.path, IMAGE_SUFFIXES) if self.path.is_dir() else [self.path]

    def fingerprint(self) -> str:
        return files_fingerprint(self.files[: self.limit], self.files[0].parent)

    @cached_property
    def _first(self) -> Frame:
        return read_image(self.files[0], deep=True)

    def _size(self) -> tuple[int, int, int]:
        height, width, _ = self._first.shape
        return len(self.files), height, width

    def _read(self) -> Iterator[Frame]:
        for file in self.files:
            frame = read_image(file, deep=self._first.dtype == np.uint16)
            if frame.shape[:2] != (self.size.height, self.size.width):
                raise UserError(f"{file} differs in size from {self.files[0].name}: the frames of a clip have one size")
            yield frame


class _Array(Clip):
    @cached_property
    def _array(self) -> NDArray[np.uint8] | NDArray[np.floating]:
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{self.path} is not a readable .npy array ({error})") from None
        if array.ndim != 4 or array.shape[-1] != 3 or not len(array):
            raise UserError(f"{self.path} has shape {array.shape}; a clip is (frames, height, width, 3)")
        if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
            raise UserError(f"{self.path} holds {array.dtype}; a clip is uint8, or float in [0, 1]")
        return array

    def _size(self) -> tuple[int, int, int]:
        next(self._read())
        return self._array.shape[0], self._array.shape[1], self._array.shape[2]

    def _read(self) -> Iterator[Frame]:
        for index in range(len(self._array)):
            # Pages of a mapping would stay counted as memory of the process until it is closed: map one frame.
            frame = np.array(np.load(self.path, mmap_mode="r")[index])
            if frame.dtype != np.uint8 and not (np.nanmin(frame) >= 0 and np.nanmax(frame) <= 1):
                raise UserError(f"{self.path} holds values outside [0, 1]; a float clip is in [0, 1]")
            yield frame


def open_clip(path: Path, limit: int | None = None) -> Clip:
    """The clip at `path`; frames are read later.

    Raises:
        UserError: nothing is there, or it is no clip.
    """
    if not path.exists():
        raise UserError(f"no clip {path}")
    if path.is_dir() and not _visible(path, IMAGE_SUFFIXES):
        raise UserError(f"{path} holds no images")
    kinds: dict[str, type[Clip]] = {".npy": _Array, **dict.fromkeys(VIDEO_SUFFIXES, _Video)}
    kinds |= dict.fromkeys(IMAGE_SUFFIXES, _Images)
    kind = _Images if path.is_dir() else kinds.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} is no clip: give a video, a folder of images, or a .npy array (F, H, W, 3)")
    return kind(path, limit)


def load_clip(path: Path, max_frames: int | None = None) -> Tensor:
    """A short clip at once, float32 (F, 3, H, W) in [0, 1]; errors as of `open_clip` and `Clip.frames`."""
    return to_tensor(np.stack(list(open_clip(path, max_frames).read())))  # type: ignore[arg-type]


def to_tensor(frames: Frame) -> Tensor:
    """(F, H, W, 3), uint8, uint16 or float in [0, 1] -> float32 (F, 3, H, W) in [0, 1]."""
    if frames.dtype == np.uint16:
        frames = frames.astype(np.float32) / 65535
    tensor = torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()


def find_clips(place: Path) -> dict[str, Path]:
    """Clips by name: `place` itself if it is a clip, else every clip at any depth of the folder.

    A clip's name is its path in the folder, without a file's suffix: `animal/001`. One `*` in `place` stands for the
    name where the frames lie deeper: `SPMCS/*/truth`.

    Raises:
        UserError: nothing there, two clips of one name, or images beside folders of images.
    """
    if "*" in str(place):
        return _matching(str(place))
    if not place.exists():
        raise UserError(f"no file or folder {place}")
    inside = _clips_inside(place) if place.is_dir() else []
    if is_clip(place):
        if inside:
            raise UserError(f"{place} holds images and clips ({inside[0].name}): leave only one kind there")
        return {_name(place, place.parent): place}
    if not inside:
        raise UserError(f"{place} holds no clip: no video, no folder of images, no .npy")
    found: dict[str, Path] = {}
    for path in inside:
        name = _name(path, place)
        if name in found:
            raise UserError(f"{place} holds two clips named {name}: {found[name].name}, {path.name}")
        found[name] = path
    return found


def is_clip(path: Path) -> bool:
    """Whether `path` is one clip: a video, an array, an image or a folder of images."""
    if path.is_dir():
        return bool(_visible(path, IMAGE_SUFFIXES))
    return path.suffix.lower() in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, ".npy")


def _visible(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with one of the suffixes in natural order; hidden ones are a file system's or unfinished."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    return sorted(found, key=natural_order)


def _clips_inside(folder: Path) -> list[Path]:
    found = _visible(folder, (*VIDEO_SUFFIXES, ".npy"))
    for child in folder.iterdir():
        if child.is_dir() and not child.name.startswith("."):
            found += [child] if is_clip(child) else _clips_inside(child)
    return sorted(found, key=natural_order)


def _matching(pattern: str) -> dict[str, Path]:
    before, star, after = pattern.partition("*")
    root = Path(before or ".")
    if "*" in after or (before and not before.endswith("/")) or not after.startswith("/"):
        raise UserError(f"{pattern}: one * stands for a folder's whole name, as in SPMCS/*/truth")
    found = {path.parts[len(root.parts)]: path for path in sorted(root.glob(f"{star}{after}"), key=natural_order)}
    found = {name: path for name, path in found.items() if is_clip(path) and not name.startswith(".")}
    if not found:
        raise UserError(f"{pattern} matches no clip: no video, no folder of images, no .npy")
    return found


def _name(path: Path, root: Path) -> str:
    relative = path.relative_to(root)
    return (relative if path.is_dir() else relative.with_suffix("")).as_posix()
