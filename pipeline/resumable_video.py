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
from common.video_probe import VideoInfo
from common.video_reader import VideoReader
from common.video_writer import VideoWriter
from pipeline.container import TrackPlan, frame_times, join, times_restart, write_output
from pipeline.video_windows import Place

#: says that the output was about to get its name
FINISHED = "finished"


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
    #: how long the last frame is shown, in the unit of `pts`; 0: not known
    last_duration: int = 0


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
            delete_parts(output)
        elif differences := self._differences(job):
            raise UserError(
                f"{self._folder} holds parts of another job ({'; '.join(differences)}); "
                "give its options, or --restart to delete them"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / FINISHED).unlink(missing_ok=True)
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
        """FFmpeg's errors while the frames were read, each once: a resumed job reads some frames again."""
        return list(dict.fromkeys(error for part in self.complete for error in part.errors))

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
            part = Part(
                written, None if clip is None else place, pts, base, dict(statistics), new_errors, reader.last_duration
            )
            write_atomic(path.with_suffix(".json"), json.dumps(asdict(part)) + "\n")
            self.complete.append(part)

    def rehearse(
        self, source: Path | None, tracks: TrackPlan, open_writer: Callable[[Path], VideoWriter], black: np.ndarray
    ) -> None:
        """Write an output of one black frame and a moment of the other tracks, and delete it.

        Raises:
            UserError: the encoder or the container refuses what it is to be given.
        """
        frame, joined = self._folder / f"black{self._suffix}", self._folder / f"black-joined{self._suffix}"
        named = self._folder / f"black-output{self._output.suffix}"
        try:
            with open_writer(frame) as writer:
                writer.write(black)
            join([frame], joined)
            write_output(joined, named, source, tracks, Fraction(0), Fraction(25), limit_s=0.2)
        except UserError as error:
            reason = str(error).split(": ", 1)[-1]
            raise UserError(f"cannot write {self._output}: {reason}") from None
        finally:
            for path in (frame, joined, named):
                path.unlink(missing_ok=True)

    def finish(
        self, source: Path | None, tracks: TrackPlan, info: VideoInfo, constant_rate: Fraction | None
    ) -> tuple[list[Fraction], Fraction]:
        """Join the parts under the output's name, with the other tracks of `source`.

        Args:
            info: of the source.
            constant_rate: of the parts; None: every frame has a time of its own.

        Returns:
            Seconds of each frame from the start of the source's first stream, and how long the last one is shown.

        Raises:
            UserError: no frame was written, or the output cannot be.
        """
        if not self.frames:
            raise UserError(f"{self._output}: there is no frame to write; choose another --start")
        rate = constant_rate or info.frame_rate
        stamps = [None if pts is None else pts * base for pts, base in self.times]
        if constant_rate is not None and stamps[0] is not None:  # they count from the first frame
            stamps = [None if stamp is None else stamp - stamps[0] + info.first_s for stamp in stamps]
        times = frame_times([None if stamp is None else stamp - info.start_s for stamp in stamps], rate)
        last_s = 1 / rate if constant_rate is not None else self._last_s(info, times[-1])
        restarts = source is not None and times_restart(source)
        joined, named = self._folder / f"joined{self._suffix}", self._folder / f"output{self._output.suffix}"
        join([self._path(index) for index in range(len(self.complete))], joined, times, last_s)
        offset = times[0] if source else Fraction(0)
        write_output(joined, named, source, tracks, offset, rate, restarts=restarts)
        write_atomic(self._folder / FINISHED, "")
        os.replace(named, self._output)
        fsync(self._output.parent)
        return times, last_s

    def _last_s(self, info: VideoInfo, time: Fraction) -> Fraction:
        """How long the last frame, shown at `time`, is shown; an FFmpeg before 6 leaves it to the header."""
        last = self.complete[-1]
        if last.last_duration:
            return last.last_duration * Fraction(*last.time_base)
        period = 1 / info.frame_rate
        if self.errors or info.end_s is None:
            return period
        return max(period, Fraction(info.end_s).limit_denominator(90_000) - time)

    def leave(self, *, done: bool) -> None:
        """Delete what the next run cannot use: after a failure complete parts stay."""
        if done or not self.complete:
            delete_parts(self._output)

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


def delete_parts(output: Path) -> None:
    """All but the lock."""
    for path in parts_folder(output).glob("*"):
        if not path.name.startswith(LOCK_NAME):
            path.unlink()


def was_finished(output: Path, job: dict[str, Any]) -> bool:
    """Whether a run of this job was killed just after the output got its name, before its parts were deleted."""
    folder = parts_folder(output)
    if not (output.exists() and (folder / FINISHED).exists()) or (folder / f"output{output.suffix}").exists():
        return False
    try:
        before = json.loads((folder / "job.json").read_text())
    except (OSError, ValueError):
        return False
    return all(before.get(name) == value for name, value in job.items())


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
