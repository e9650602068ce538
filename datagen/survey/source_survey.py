"""What the survey finds out: `SourceSurvey` with its `Window`s, or `Unreadable`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from common.video_probe import UNSPECIFIED
from datagen.sources import Source


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive frames within one scene.

    Attributes:
        start: index of the first frame. pts: its time stamp, None where frames have none.
        luma, contrast, motion, sharpness: means over the frames; motion leaves out the first.
        novelty: mean absolute difference of luma, 0...255, from the most similar stretch of frames up to
            `LOOK_BACK` frames earlier in the source (video_survey.py); 255 where there is none.
        hashes: of the first, middle and last frame, 64 bit, hexadecimal; None for a frame without structure.
    """

    start: int
    pts: int | None
    luma: float
    contrast: float
    motion: float
    sharpness: float
    novelty: float
    hashes: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class SourceSurvey:
    """A video that was decoded from beginning to end.

    Attributes:
        content: hash of the video stream: tells one video from another of the same name.
        cuts: first frames of the second and later scenes.
        transfer: of the first frame, a code of ITU-T H.273.
        interlaced: part of the frames that are marked so.
        bars: part of the height or of the width that is black at both of its ends in all frames.
    """

    source: Source
    width: int
    height: int
    frames: int
    frames_per_second: float
    content: str
    cuts: tuple[int, ...]
    windows: tuple[Window, ...]
    transfer: int = UNSPECIFIED
    interlaced: float = 0.0
    bars: float = 0.0


@dataclass(frozen=True)
class Unreadable:
    """A video that cannot be decoded; `unreachable` if its bytes could not be read, so that it may be sound."""

    source: Source
    reason: str
    unreachable: bool = False


def to_document(survey: SourceSurvey | Unreadable) -> dict[str, Any]:
    """JSON types, without the source's path, which may change from run to run."""
    fields = {name: value for name, value in asdict(survey).items() if name != "source"}
    return {"source": survey.source.id, **fields}


def from_document(document: dict[str, Any], source: Source) -> SourceSurvey | Unreadable:
    """What `to_document` wrote of `source`."""
    fields = {name: value for name, value in document.items() if name != "source"}
    if "reason" in fields:
        return Unreadable(source, **fields)
    windows = tuple(Window(**window | {"hashes": tuple(window["hashes"])}) for window in fields["windows"])
    return SourceSurvey(source, **fields | {"cuts": tuple(fields["cuts"]), "windows": windows})
