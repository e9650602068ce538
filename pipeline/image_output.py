"""Images as output: a file, numbered files (`frame_%05d.png`), or a folder with the names of the input's images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.encoders import IMAGE_ENCODERS, IMAGE_OUTPUT_SUFFIXES, OUTPUT_SUFFIXES
from common.errors import UserError
from common.image_files import files_of_pattern, images_in, is_pattern, numbered
from pipeline.upscale_source import Source

#: number of the first image of a pattern, FFmpeg's own
FIRST_NUMBER = 1


@dataclass(frozen=True)
class ImageOutput:
    """Where frames go."""

    #: a file, a pattern, or the folder of `names`
    path: Path
    #: one of IMAGE_ENCODERS
    codec: str
    #: of each frame in the folder `path`; None: `path` is a file or a pattern
    names: tuple[str, ...] | None = None

    def file(self, frame: int) -> Path:
        """Of a frame, counted from 0."""
        if self.names is not None:
            return self.path / self.names[frame]
        return numbered(self.path, frame + FIRST_NUMBER) if is_pattern(self.path) else self.path

    def existing(self) -> list[Path]:
        """Files that it may replace."""
        if self.names is not None:
            return [path for name in self.names if (path := self.path / name).exists()]
        if is_pattern(self.path):
            return [path for _, path in files_of_pattern(self.path)]
        return [self.path] if self.path.exists() else []


def image_output(output: Path, source: Source, start: int, frames: int | None) -> ImageOutput | None:
    """What `output` names, if it is images.

    Args:
        start, frames: the part of the source that is upscaled.

    Raises:
        UserError: a single image for many frames, or a kind of image that is not written.
    """
    suffix = output.suffix.lower()
    if suffix in IMAGE_OUTPUT_SUFFIXES and not output.is_dir():
        if not is_pattern(output) and frames != 1 and source.info.frames != 1:
            numbers = output.with_name(f"{output.stem}_%05d{output.suffix}")
            raise UserError(f"cannot write {output}: one image holds one frame; name {numbers}, or give --frames 1")
        return ImageOutput(output, _codec(suffix))
    if source.images is None or (suffix in OUTPUT_SUFFIXES and not output.is_dir()):
        return None
    if suffix and not output.is_dir():
        known = ", ".join((*OUTPUT_SUFFIXES, *IMAGE_OUTPUT_SUFFIXES))
        raise UserError(f"cannot write {output}: choose one of {known}, or a folder")
    given = source.files[0].suffix
    kept = given if given.lower() in IMAGE_OUTPUT_SUFFIXES else ".png"
    if source.images.durations_ms:
        return ImageOutput(output / f"{source.path.stem.replace('%', '_')}_%05d{kept}", _codec(kept.lower()))
    end = None if frames is None else start + frames
    return ImageOutput(output, _codec(kept.lower()), tuple(f"{path.stem}{kept}" for path in source.files[start:end]))


def _codec(suffix: str) -> str:
    return next(name for name, encoder in IMAGE_ENCODERS.items() if suffix in encoder.suffixes)


def stills_of(folder: Path) -> list[Path]:
    """
    Raises:
        UserError: the folder holds no image.
    """
    if not (paths := images_in(folder)):
        raise UserError(f"no image in {folder}")
    return paths
