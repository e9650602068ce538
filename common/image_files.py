"""Image files: which make a sequence, in which order (a file, a folder, a printf pattern, a glob), their pixels."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import UserError
from common.exr import exr_header, is_exr, read_exr
from common.video_probe import APPLE_DOUBLE, named_like_a_video

#: images that are read
IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".webp", ".bmp", ".exr")
#: what `frame_%05d.png` holds in the place of the number
_NUMBER = re.compile(r"%(?:0(\d+))?d")
#: EXIF's orientation, and the values of it that lie on the side
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)


def named_like_an_image(name: str) -> bool:
    """By its suffix; AppleDouble files are none."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not Path(name).name.startswith(APPLE_DOUBLE)


def natural_order(path: Path) -> tuple[list[list[int | str]], str]:
    """A sort key that reads runs of digits as numbers, in folders' names too: `9.png` comes before `10.png`."""
    parts = [re.split(r"(\d+)", part) for part in path.parts]
    return [[int(piece) if piece.isdecimal() else piece for piece in part] for part in parts], str(path)


def is_pattern(path: Path) -> bool:
    """Whether the name holds a number as printf writes it, as `frame_%05d.png`."""
    return _NUMBER.search(path.name) is not None


def numbered(pattern: Path, number: int) -> Path:
    """The file of a pattern that has this number."""
    place = _NUMBER.search(pattern.name)
    assert place is not None
    digits = str(number).zfill(int(place[1] or 0))
    return pattern.with_name(pattern.name[: place.start()] + digits + pattern.name[place.end() :])


def files_of_pattern(pattern: Path) -> list[tuple[int, Path]]:
    """Existing files of a pattern with their numbers, in the order of these."""
    before, after = pattern.name[: (place := _number(pattern)).start()], pattern.name[place.end() :]
    name = re.compile(f"{re.escape(before)}(\\d+){re.escape(after)}")
    folder = pattern.parent
    found = ((name.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    numbers = sorted((int(match[1]), path) for match, path in found if match)
    return [(number, path) for number, path in numbers if numbered(pattern, number) == path]


def _number(pattern: Path) -> re.Match[str]:
    found = _NUMBER.search(pattern.name)
    assert found is not None
    return found


def holds_a_sequence(folder: Path) -> bool:
    """Whether a folder holds images and no video."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return any(map(named_like_an_image, names)) and not any(map(named_like_a_video, names))


def images_in(folder: Path) -> list[Path]:
    """Its images in natural order."""
    return sorted((path for path in folder.iterdir() if named_like_an_image(path.name)), key=natural_order)


def find_images(given: Path) -> list[Path] | None:
    """Images that `given` names, in order; None where it names something else.

    Raises:
        UserError: no file of a pattern, or files of different kinds in a folder.
    """
    if given.is_dir():
        return _of_one_kind(images_in(given), given) if holds_a_sequence(given) else None
    if not named_like_an_image(given.name):
        return None
    if given.exists():
        return [given]
    if is_pattern(given):
        paths = [path for _, path in files_of_pattern(given)]
    elif glob.has_magic(given.name):
        paths = sorted((path for path in given.parent.glob(given.name) if path.is_file()), key=natural_order)
    else:
        raise UserError(f"no image {given}")
    if not paths:
        raise UserError(f"no image is named like {given}")
    return paths


def missing_numbers(pattern: Path) -> int:
    """How many numbers a pattern's files leave out between the first and the last."""
    numbers = [number for number, _ in files_of_pattern(pattern)]
    return numbers[-1] - numbers[0] + 1 - len(numbers)


def _of_one_kind(paths: Sequence[Path], folder: Path) -> list[Path]:
    kinds = sorted({path.suffix.lower().replace("jpeg", "jpg").replace("tiff", "tif") for path in paths})
    if len(kinds) > 1:
        raise UserError(
            f"{folder} holds {', '.join(kinds)} images: one sequence has one kind; name it, as {folder}/*{kinds[0]}, "
            "or give --stills"
        )
    return list(paths)


def header(path: Path) -> Image.Image:
    """The image with its size and mode known and its pixels still in the file.

    Raises:
        UserError: no image.
    """
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an image, or a damaged one"
        raise UserError(f"{path} cannot be read ({reason}); convert it or leave it out") from None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as EXIF asks for it to be shown."""
    width, height = image.size
    if image.format == "PNG" and "exif" not in image.info:
        return width, height  # Pillow would decode all of it to look behind the pixels
    return (height, width) if image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE else (width, height)


def check_sizes(paths: Sequence[Path], size: tuple[int, int]) -> None:
    """
    Raises:
        UserError: one of the images is none, or has another size.
    """
    for path in paths:
        width, height = _size(path)
        if (width, height) != size:
            raise UserError(
                f"{path} has {width}x{height} pixels and the first image of the sequence {size[0]}x{size[1]}; "
                "leave it out, or give --stills"
            )


def _size(path: Path) -> tuple[int, int]:
    if is_exr(path):
        return exr_header(path)[:2]
    with header(path) as image:
        return upright_size(image)


def read_image(path: Path, *, deep: bool, alpha: bool = False) -> np.ndarray:
    """(H, W, 3) RGB, or with `alpha` (H, W, 4), turned upright; uint16 where `deep` and the file holds 16 bits.

    EXR is always RGB of 16 bits (common/exr.py).

    Raises:
        UserError: the file is damaged.
    """
    if is_exr(path):
        return read_exr(path)
    if deep:  # Pillow has no RGB of 16 bits, OpenCV takes half a JPEG for a whole one
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            content = np.fromfile(path, np.uint8)
            flags = cv2.IMREAD_UNCHANGED if alpha else cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
            pixels = cv2.imdecode(content, flags) if content.size else None
        except (OSError, cv2.error):
            pixels = None
        finally:
            cv2.utils.logging.setLogLevel(level)
        if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
            raise UserError(f"{path} is damaged or holds no 8 or 16 bits; convert it or leave it out")
        if pixels.dtype == np.uint16:
            code = cv2.COLOR_BGRA2RGBA if alpha else cv2.COLOR_BGR2RGB
            if alpha and (pixels.ndim == 2 or pixels.shape[2] == 3):
                code = cv2.COLOR_GRAY2RGBA if pixels.ndim == 2 else cv2.COLOR_BGR2RGBA
            return cv2.cvtColor(pixels, code)
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGBA" if alpha else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
