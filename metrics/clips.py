"""Clips from disk as metrics want them: float32 (F, 3, H, W) RGB in [0, 1].

A clip is a video file, a folder of pictures (in the order of their names) or a .npy array. Scores to be
compared with others' are taken before any lossy encode: pictures, .npy, or a lossless video such as FFV1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.errors import UserError
from common.video_probe import VIDEO_SUFFIXES
from common.video_reader import read_video

PICTURE_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".webp", ".jpg", ".jpeg")


def load_clip(path: Path, max_frames: int | None = None) -> Tensor:
    """Read one clip.

    Raises:
        UserError: the file is missing, unreadable or of another kind.
    """
    frames: NDArray[np.uint8] | NDArray[np.floating]
    if path.is_dir():
        frames = _read_pictures(path, max_frames)
    elif not path.exists():
        raise UserError(f"no clip {path}")
    elif path.suffix.lower() == ".npy":
        frames = _read_array(path)
    elif path.suffix.lower() in VIDEO_SUFFIXES:
        frames = read_video(path, frames=max_frames)
    elif path.suffix.lower() in PICTURE_SUFFIXES:
        frames = _read_picture(path)[None]
    else:
        raise UserError(f"{path} is no clip: give a video, a folder of pictures, or a .npy array (F, H, W, 3)")
    return to_tensor(frames[:max_frames])


def to_tensor(frames: NDArray[np.uint8] | NDArray[np.floating]) -> Tensor:
    """(F, H, W, 3), uint8 or float in [0, 1] -> float32 (F, 3, H, W) in [0, 1]."""
    tensor = torch.from_numpy(np.require(frames, requirements=("C", "W"))).permute(0, 3, 1, 2)
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()


def find_clips(path: Path) -> dict[str, Path]:
    """Clips at `path` by name: `path` itself if it is a clip, else every clip directly inside the folder.

    Raises:
        UserError: nothing there, or two clips of one name.
    """
    if not path.exists():
        raise UserError(f"no file or folder {path}")
    if is_clip(path):
        return {path.stem: path}
    found: dict[str, Path] = {}
    for child in sorted(path.iterdir()) if path.is_dir() else []:
        if not is_clip(child) or child.suffix.lower() in PICTURE_SUFFIXES:
            continue
        if child.stem in found:
            raise UserError(f"{path} holds two clips named {child.stem}: {found[child.stem].name}, {child.name}")
        found[child.stem] = child
    if not found:
        raise UserError(f"{path} holds no clip: no video, no folder of pictures, no .npy")
    return found


def is_clip(path: Path) -> bool:
    """Whether `path` is one clip: a video, an array, a picture or a folder of pictures."""
    if path.is_dir():
        return any(child.suffix.lower() in PICTURE_SUFFIXES for child in path.iterdir())
    return path.suffix.lower() in (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES, ".npy")


def _read_pictures(folder: Path, max_frames: int | None) -> NDArray[np.uint8]:
    files = sorted(child for child in folder.iterdir() if child.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no pictures")
    files = files[:max_frames]
    frames = [_read_picture(file) for file in files]
    for file, frame in zip(files, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise UserError(f"{file} differs in size from {files[0].name}: the frames of a clip have one size")
    return np.stack(frames)


def _read_picture(file: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{file} is not a readable picture ({error})") from None


def _read_array(path: Path) -> NDArray[np.uint8] | NDArray[np.floating]:
    try:
        frames = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable .npy array ({error})") from None
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise UserError(f"{path} has shape {frames.shape}; a clip is (frames, height, width, 3)")
    if frames.dtype != np.uint8 and not np.issubdtype(frames.dtype, np.floating):
        raise UserError(f"{path} holds {frames.dtype}; a clip is uint8, or float in [0, 1]")
    if frames.dtype != np.uint8 and not (np.nanmin(frames) >= 0 and np.nanmax(frames) <= 1):
        raise UserError(f"{path} holds values outside [0, 1]; a float clip is in [0, 1]")
    return frames
