"""A video written in parts, so that a killed job can be resumed.

    .out.mp4.parts/
        job.json          what decides the pixels: input, model, options
        sizes.json        and tiles and windows, which may have been chosen from the free memory
        part-00000.mp4    (.mov) a closed stretch of video
        part-00000.json   its frames and their times, and where the video continues: written last, so a part without it
                          does not count

Parts are joined without being encoded again, and go when the joined video is complete: the disk never holds more than
two of parts, joined video and output. Their folder lies beside the output and is removed with the last of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from common.atomic import write_atomic
from common.errors import UserError
from common.locking import LOCK_NAME, only_writer
from common.video_reader import Mark
from common.video_writer import VideoWriter
from pipeline.image_output import ImageOutput
from pipeline.upscale_source import FrameReader
from pipeline.video_windows import Place

SIZES = "sizes.json"
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
    #: of the source's frame with which reading goes on after it; None where that begins with the first one
    checksum: int | None = None


class VideoParts:
    """The parts of one output."""

    def __init__(
        self,
        output: Path,
        job: dict[str, Any],
        part_frames: int,
        *,
        restart: bool = False,
        images: ImageOutput | None = None,
    ) -> None:
        """Read the complete parts of an earlier run of the same job; nothing is written before `begin`.

        Args:
            job: everything that decides the pixels; JSON types.
            part_frames: a part ends with the first place after so many frames where the video can be continued.
            restart: delete the parts of an earlier run.
            images: where frames go; None: the output is a video.

        Raises:
            UserError: there are parts of another job.
        """
        self.output, self._part_frames = output, part_frames
        self.folder = parts_folder(output)
        # Both keep time stamps exactly, whatever the output's container does; one takes ProRes, the other VP9.
        self.suffix = ".mov" if images or output.suffix.lower() == ".mov" else ".mp4"
        self.images = images
        if restart:
            delete_parts(output)
        elif differences := self._differences(job):
            raise UserError(
                f"{self.folder} holds parts of another job ({'; '.join(differences)}); "
                "give its options, or --restart to delete them"
            )
        self._job = job
        self.complete = self._read()

    def begin(self) -> None:
        """Record the job and delete what an earlier run left unfinished; `leave` undoes it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / FINISHED).unlink(missing_ok=True)
        for unfinished in self.folder.glob(".*"):
            if not unfinished.name.startswith(LOCK_NAME):
                unfinished.unlink()
        write_atomic(self.folder / "job.json", json.dumps(self._job) + "\n")

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

    @property
    def mark(self) -> Mark | None:
        """Where reading goes on; None where times do not tell the place, or were not recorded."""
        last = self.complete[-1] if self.complete else None
        if last is None or last.place is None or last.checksum is None:
            return None
        times = [pts for part in self.complete for pts in part.pts]
        first = last.place.start - last.place.context
        pts = times[first]
        if pts is None or not all(earlier is not None and earlier < pts for earlier in times[:first]):
            return None
        return Mark(pts, Fraction(*last.time_base), last.checksum)

    def write(
        self,
        clips: Iterable[tuple[np.ndarray, Place | None]],
        reader: FrameReader,
        open_writer: Callable[[Path], VideoWriter],
        statistics: dict[str, float],
        on_frames: Callable[[int], None],
    ) -> None:
        """Append the rest of the video.

        Args:
            clips: frames (F, H, W, 3), each with the place that follows it, None where it cannot be continued.
            reader: what they are made from, one frame of each of its frames from `place.context` on.
            open_writer: opens a video file.
            statistics: recorded with each part.
            on_frames: called with the number of frames written.
        """
        assert self.place is not None
        rest = _without_first(clips, self.place.skip)
        clip = next(rest, None)
        first = self.place.start - self.place.context
        read, errors = self.place.context + self.place.skip, 0
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
            place = None if clip is None else place
            checksum = place and reader.checksum(place.start - place.context - first)
            part = Part(written, place, pts, base, dict(statistics), new_errors, reader.last_duration, checksum)
            write_atomic(path.with_suffix(".json"), json.dumps(asdict(part)) + "\n")
            self.complete.append(part)

    @property
    def sizes(self) -> dict[str, Any] | None:
        """As `keep_sizes` was given them; None where nothing was written with them."""
        if not self.complete:
            return None
        try:
            values: dict[str, Any] = json.loads((self.folder / SIZES).read_text())
            return values
        except (OSError, ValueError):
            return None

    def keep_sizes(self, values: dict[str, Any]) -> None:
        """Of tiles and windows, JSON types: a resumed job goes on with them, whatever memory is free then."""
        write_atomic(self.folder / SIZES, json.dumps(values) + "\n")

    def leave(self, *, done: bool) -> None:
        """Delete what the next run cannot use: after a failure complete parts stay."""
        if done or not self.complete:
            delete_parts(self.output)

    def mark_finished(self) -> None:
        """From here on the output only has to get its name; the mark says of which job."""
        write_atomic(self.folder / FINISHED, (self.folder / "job.json").read_text())

    def delete_videos(self) -> None:
        """Once the joined file holds them; what is recorded of them stays."""
        for path in self.videos:
            path.unlink(missing_ok=True)

    @property
    def videos(self) -> list[Path]:
        return [self._path(index) for index in range(len(self.complete))]

    @property
    def joined(self) -> Path:
        return self.folder / f"joined{self.suffix}"

    def _path(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}{self.suffix}"

    def _read(self) -> list[Part]:
        parts: list[Part] = []
        while (path := self._path(len(parts))).exists() or self.joined.exists():
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
            before = json.loads((self.folder / "job.json").read_text())
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
    """All but the lock; last the mark by which a run that is killed meanwhile is known to have finished."""
    for path in sorted(parts_folder(output).glob("*"), key=lambda path: path.name == FINISHED):
        if not path.name.startswith(LOCK_NAME):
            path.unlink()


def was_finished(output: Path, job: dict[str, Any]) -> bool:
    """Whether a run of this job was killed just after the output got its name, before its parts were deleted."""
    folder = parts_folder(output)
    if not (output.is_file() and (folder / FINISHED).exists()) or (folder / f"output{output.suffix}").exists():
        return False
    return _same_job(folder / FINISHED, job)


def only_lock_left(output: Path) -> bool:
    """Whether a finished run was killed between the last file that it deleted and its folder."""
    folder = parts_folder(output)
    return output.is_file() and folder.is_dir() and all(path.name.startswith(LOCK_NAME) for path in folder.iterdir())


def naming_began(output: Path, job: dict[str, Any]) -> bool:
    """Whether a run of this job was killed while its images got their names."""
    folder = parts_folder(output)
    return _same_job(folder / FINISHED, job)


def _same_job(file: Path, job: dict[str, Any]) -> bool:
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return all(before.get(name) == value for name, value in job.items())


@contextmanager
def only_job(output: Path) -> Iterator[None]:
    """Hold the lock of the output's parts; their folder goes with the last of them, and so do empty ones made for it.

    Raises:
        UserError: another process writes this output.
    """
    folder = parts_folder(output)
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        with only_writer(folder):
            yield
    finally:
        with suppress(OSError):
            for empty in (folder, *made):
                empty.rmdir()


def _without_first(
    clips: Iterable[tuple[np.ndarray, Place | None]], frames: int
) -> Iterator[tuple[np.ndarray, Place | None]]:
    for clip, place in clips:
        if len(clip) > frames:
            yield clip[frames:], place
        frames = max(0, frames - len(clip))
