"""A video written in parts, so that a killed job can be resumed.

    .out.mp4.parts/
        job.json          what decides the pixels: input, model, options
        part-00000.mp4    (.mov) a closed stretch of video
        part-00000.json   its frames and their times, and where the video continues: written last, so a part without it
                          does not count

Parts are joined without being encoded again. Their folder lies beside the output and is removed when that is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from common.atomic import fsync, write_atomic
from common.errors import UserError
from common.locking import LOCK_NAME, only_writer
from common.video_reader import VideoReader
from common.video_writer import VideoWriter
from pipeline.container import TrackPlan, frame_times, join, write_output
from pipeline.video_windows import Place


@dataclass(frozen=True)
class Part:
    """What is recorded of a complete part."""

    frames: int
    #: None where the video ends with it
    place: Place | None
    #: time stamp of each frame, None where the source has none
    pts: list[int | None]
    #: seconds of one unit of them, as numerator and denominator
    time_base: tuple[int, int]
    #: of the job so far
    statistics: dict[str, float] = field(default_factory=dict)
    #: FFmpeg's errors while its frames were read
    errors: list[str] = field(default_factory=list)


class VideoParts:
    """The parts of one output."""

    def __init__(self, output: Path, job: dict[str, Any], part_frames: int, *, restart: bool = False) -> None:
        """Take over the complete parts of an earlier run of the same job.

        Args:
            job: everything that decides the pixels; JSON types.
            part_frames: a part ends with the first place after so many frames where the video can be continued.
            restart: delete the parts of an earlier run.

        Raises:
            UserError: there are parts of another job.
        """
        self._output, self._part_frames = output, part_frames
        self._folder = parts_folder(output)
        # Both keep time stamps exactly, whatever the output's container does; one takes ProRes, the other VP9.
        self._suffix = ".mov" if output.suffix.lower() == ".mov" else ".mp4"
        if restart:
            self._delete()
        elif differences := self._differences(job):
            raise UserError(
                f"{self._folder} holds parts of another job ({'; '.join(differences)}); "
                "give its options, or --restart to delete them"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self._folder.glob(".*"):
            if not unfinished.name.startswith(LOCK_NAME):
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

    @property
    def errors(self) -> list[str]:
        """FFmpeg's errors while the frames were read."""
        return [error for part in self.complete for error in part.errors]

    @property
    def times(self) -> list[tuple[int | None, Fraction]]:
        """Time stamp and unit of each frame."""
        return [(pts, Fraction(*part.time_base)) for part in self.complete for pts in part.pts]

    def write(
        self,
        clips: Iterable[tuple[np.ndarray, Place | None]],
        reader: VideoReader,
        context: int,
        open_writer: Callable[[Path], VideoWriter],
        statistics: dict[str, float],
        on_frames: Callable[[int], None],
    ) -> None:
        """Append the rest of the video.

        Args:
            clips: frames (F, H, W, 3), each with the place that follows it, None where it cannot be continued.
            reader: what they are made from, one frame of each of its frames.
            context: number of its first frames that `clips` leave out.
            open_writer: opens a video file.
            statistics: recorded with each part.
            on_frames: called with the number of frames written.
        """
        assert self.place is not None
        rest = _without_first(clips, self.place.skip)
        clip = next(rest, None)
        read, errors = context + self.place.skip, 0
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
            pts, read = reader.pts[read : read + written], read + written
            new_errors, errors = reader.errors[errors:], len(reader.errors)
            base = (reader.time_base.numerator, reader.time_base.denominator)
            part = Part(written, None if clip is None else place, pts, base, dict(statistics), new_errors)
            write_atomic(path.with_suffix(".json"), json.dumps(asdict(part)) + "\n")
            self.complete.append(part)

    def finish(self, source: Path | None, tracks: TrackPlan, frame_rate: Fraction, start_s: Fraction) -> list[Fraction]:
        """Join the parts under the output's name, with the other tracks of `source`.

        Args:
            frame_rate: of frames without times, and of a container without time stamps.
            start_s: when the first stream of the source starts.

        Returns:
            Seconds of each frame from there on.

        Raises:
            UserError: no frame was written, or the output cannot be.
        """
        if not self.frames:
            raise UserError(f"{self._output}: there is no frame to write; choose another --start")
        times = frame_times([None if pts is None else pts * base - start_s for pts, base in self.times], frame_rate)
        joined, named = self._folder / f"joined{self._suffix}", self._folder / f"output{self._output.suffix}"
        join([self._path(index) for index in range(len(self.complete))], joined, times)
        write_output(joined, named, source, tracks, times[0] if source else Fraction(0), frame_rate)
        os.replace(named, self._output)
        fsync(self._output.parent)
        return times

    def leave(self, *, done: bool) -> None:
        """Delete what the next run cannot use: after a failure complete parts stay."""
        if done or not self.complete:
            self._delete()

    def _delete(self) -> None:
        for path in self._folder.glob("*"):
            if not path.name.startswith(LOCK_NAME):
                path.unlink()

    def _path(self, index: int) -> Path:
        return self._folder / f"part-{index:05d}{self._suffix}"

    def _read(self) -> list[Part]:
        parts: list[Part] = []
        while (path := self._path(len(parts))).exists():
            try:
                values = json.loads(path.with_suffix(".json").read_text())
                place = values["place"] and Place(*values["place"])
                values |= {"place": place, "time_base": tuple(values["time_base"])}
                parts.append(Part(**values))
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


def parts_folder(output: Path) -> Path:
    """Hidden, beside the output."""
    return output.with_name(f".{output.name}.parts")


@contextmanager
def only_job(output: Path) -> Iterator[None]:
    """Hold the lock of the output's parts; their folder goes with the last of them.

    Raises:
        UserError: another process writes this output.
    """
    try:
        with only_writer(parts_folder(output)):
            yield
    finally:
        with suppress(OSError):
            parts_folder(output).rmdir()


def _without_first(
    clips: Iterable[tuple[np.ndarray, Place | None]], frames: int
) -> Iterator[tuple[np.ndarray, Place | None]]:
    for clip, place in clips:
        if len(clip) > frames:
            yield clip[frames:], place
        frames = max(0, frames - len(clip))
