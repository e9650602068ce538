"""A video written in parts, so that a killed job can be resumed.

    .out.mp4.parts/
        job.json          what decides the pixels: input, model, options
        part-00000.mp4    a closed stretch of video
        part-00000.json   its frames, and where the video continues: written last, so a part without it does not count

Parts are joined without being encoded again. Their folder lies beside the output and is removed when that is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.atomic import write_atomic
from common.video_io import VideoWriter, join
from pipeline.video_windows import Place


@dataclass(frozen=True)
class Part:
    """What is recorded of a complete part."""

    frames: int
    #: None where the video ends with it
    place: Place | None
    #: of the job so far
    statistics: dict[str, float] = field(default_factory=dict)


class VideoParts:
    """The parts of one output."""

    def __init__(self, output: Path, job: dict[str, Any], part_frames: int) -> None:
        """Take over the complete parts of an earlier run of the same job; those of another one are deleted.

        Args:
            job: everything that decides the pixels; JSON types.
            part_frames: a part ends with the first place after so many frames where the video can be continued.
        """
        self._output, self._part_frames = output, part_frames
        self._folder = output.with_name(f".{output.name}.parts")
        #: why the parts of an earlier run are of no use, if there were any
        self.refused = self._differences(job)
        if self.refused:
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self._folder.glob(".*"):
            unfinished.unlink()
        write_atomic(self._folder / "job.json", json.dumps(job) + "\n")
        self.complete = self._read()

    @property
    def frames(self) -> int:
        """Of all complete parts."""
        return sum(part.frames for part in self.complete)

    @property
    def place(self) -> Place | None:
        """Where the video continues after them; None where they are all of it."""
        return self.complete[-1].place if self.complete else Place()

    @property
    def statistics(self) -> dict[str, float]:
        """Of the job up to there."""
        return dict(self.complete[-1].statistics) if self.complete else {}

    def write(
        self,
        clips: Iterable[tuple[np.ndarray, Place | None]],
        open_writer: Callable[[Path], VideoWriter],
        statistics: dict[str, float],
        on_frames: Callable[[int], None],
    ) -> None:
        """Append the rest of the video.

        Args:
            clips: frames (F, H, W, 3), each with the place that follows it, None where it cannot be continued.
            open_writer: opens a video file.
            statistics: recorded with each part.
            on_frames: called with the number of frames written.
        """
        assert self.place is not None
        rest = _without_first(clips, self.place.skip)
        clip = next(rest, None)
        while clip is not None:
            path = self._path(len(self.complete))
            written = 0
            with open_writer(path) as writer:
                while clip is not None:
                    frames, place = clip
                    writer.write(frames)
                    written += len(frames)
                    on_frames(len(frames))
                    clip = next(rest, None)
                    if place is not None and written >= self._part_frames:
                        break
            part = Part(written, None if clip is None else place, dict(statistics))
            write_atomic(path.with_suffix(".json"), json.dumps(asdict(part)) + "\n")
            self.complete.append(part)

    def finish(self, audio_from: Path | None) -> None:
        """Join the parts under the output's name, with the sound of `audio_from`."""
        join([self._path(index) for index in range(len(self.complete))], self._output, audio_from)
        shutil.rmtree(self._folder, ignore_errors=True)

    def leave(self) -> None:
        """After a failure: complete parts stay for the next run; without any, nothing does."""
        if not self.complete:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        # mp4 keeps time stamps exactly, whatever the output's container does
        return self._folder / f"part-{index:05d}.mp4"

    def _read(self) -> list[Part]:
        parts: list[Part] = []
        while (path := self._path(len(parts))).exists():
            try:
                values = json.loads(path.with_suffix(".json").read_text())
                place = values["place"] and Place(*values["place"])
                parts.append(Part(values["frames"], place, values["statistics"]))
            except (OSError, ValueError, KeyError, TypeError):
                break  # killed between the part and its record
        return parts

    def _differences(self, job: dict[str, Any]) -> list[str]:
        try:
            before = json.loads((self._folder / "job.json").read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError):
            return ["its record is damaged"]
        return [
            f"{name}: {before.get(name)} -> {job.get(name)}"
            for name in sorted({*before, *job})
            if before.get(name) != job.get(name)
        ]


def _without_first(
    clips: Iterable[tuple[np.ndarray, Place | None]], frames: int
) -> Iterator[tuple[np.ndarray, Place | None]]:
    for clip, place in clips:
        if len(clip) > frames:
            yield clip[frames:], place
        frames = max(0, frames - len(clip))
