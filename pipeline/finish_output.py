"""The last step of a job: its parts become the output, a video with the source's other tracks or images."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from common.atomic import fsync, write_atomic
from common.encoders import NVENC
from common.errors import UserError
from common.video_probe import VideoInfo, url
from common.video_writer import VideoWriter
from pipeline.container import TrackPlan, frame_times, join, times_restart, write_output
from pipeline.image_output import ImageOutput
from pipeline.resumable_video import VideoParts


def rehearse(
    parts: VideoParts,
    source: Path | None,
    tracks: TrackPlan,
    open_writer: Callable[[Path], VideoWriter],
    black: np.ndarray,
    codec: str,
) -> None:
    """Write an output of one black frame and a moment of the other tracks, and delete it.

    Raises:
        UserError: the encoder or the container refuses what it is to be given.
    """
    frame, joined = parts.folder / f"black{parts.suffix}", parts.folder / f"black-joined{parts.suffix}"
    named = parts.folder / f"black-output{parts.output.suffix}"
    try:
        with open_writer(frame) as writer:
            writer.write(black)
        if parts.images:
            return
        join([frame], joined)
        write_output(joined, named, source, tracks, Fraction(0), Fraction(25), limit_s=0.2)
    except UserError as error:
        reason = str(error).split(": ", 1)[-1]
        if codec in NVENC:
            reason = f"{codec} needs a GPU and a driver that encode so; leave out --encoder {codec} ({reason})"
        raise UserError(f"cannot write {parts.output}: {reason}") from None
    finally:
        for path in (frame, joined, named):
            path.unlink(missing_ok=True)


def finish(
    parts: VideoParts, source: Path | None, tracks: TrackPlan, info: VideoInfo, constant_rate: Fraction | None
) -> tuple[list[Fraction], Fraction]:
    """Join the parts, which hold a frame at least, under the output's name, with the other tracks of `source`.

    Args:
        info: of the source.
        constant_rate: of the parts; None: every frame has a time of its own.

    Returns:
        Seconds of each frame from the start of the source's first stream, and how long the last one is shown; images
        have no times.

    Raises:
        UserError: the output cannot be written.
    """
    if parts.images:
        _write_images(parts, parts.images)
        return [], Fraction(0)
    rate = constant_rate or info.frame_rate
    stamps = [None if pts is None else pts * base for pts, base in parts.times]
    if constant_rate is not None and stamps[0] is not None:  # they count from the first frame
        stamps = [None if stamp is None else stamp - stamps[0] + info.first_s for stamp in stamps]
    times = frame_times([None if stamp is None else stamp - info.start_s for stamp in stamps], rate)
    last_s = 1 / rate if constant_rate is not None else _last_s(parts, info, times[-1])
    restarts = source is not None and times_restart(source)
    named = parts.folder / f"output{parts.output.suffix}"
    if not parts.joined.exists():
        join(parts.videos, parts.joined, times, last_s)
    parts.delete_videos()
    offset = times[0] if source else Fraction(0)
    write_output(parts.joined, named, source, tracks, offset, rate, restarts=restarts)
    parts.mark_finished()
    os.replace(named, parts.output)
    fsync(parts.output.parent)
    return times, last_s


def _write_images(parts: VideoParts, images: ImageOutput) -> None:
    """Each packet of a part is a file. What is there is replaced: it is this job's, or may be overwritten."""
    parts.mark_finished()
    number = 0
    for part in parts.videos:
        with av.open(url(part)) as container:
            for packet in container.demux(video=0):
                if packet.size:
                    write_atomic(images.file(number), bytes(packet))
                    number += 1


def _last_s(parts: VideoParts, info: VideoInfo, time: Fraction) -> Fraction:
    """How long the last frame, shown at `time`, is shown; an FFmpeg before 6 leaves it to the header."""
    last = parts.complete[-1]
    if last.last_duration:
        return last.last_duration * Fraction(*last.time_base)
    period = 1 / info.frame_rate
    if parts.errors or info.end_s is None:
        return period
    return max(period, Fraction(info.end_s).limit_denominator(90_000) - time)
