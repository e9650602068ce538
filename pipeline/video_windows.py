"""Long videos in windows: cut at scene changes, overlapping within a scene, cross-faded where they overlap.

The only place with temporal windows. `VSRPipeline` takes one window; memory stays bounded, and no scene bleeds into the
next. Windows know nothing of each other, so several devices can work on one video.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.scene_cuts import CONTEXT, DELAY, SceneCuts, small_frame
from pipeline.model.vae import TEMPORAL_FACTOR
from pipeline.vsr_pipeline import VSRPipeline, VSRResult


class Place(NamedTuple):
    """Where a video can be continued: read from frame `start`, drop the first `skip` frames of what comes out."""

    start: int = 0
    skip: int = 0

    @property
    def context(self) -> int:
        """Frames to read before `start`, in which scene cuts are looked for."""
        return min(self.start, CONTEXT)


@dataclass(frozen=True)
class Windows:
    """Sizes in frames. Windows that start a multiple of 4 frames apart draw the same noise where they overlap.

    Raises:
        UserError: a window that is too short for its overlap: a frame must not lie in three windows.
    """

    frames: int = 21
    overlap: int = 5

    def __post_init__(self) -> None:
        if not (self.frames >= 5 and 0 <= 2 * self.overlap <= self.frames):
            raise UserError(
                f"a window of {self.frames} frames with an overlap of {self.overlap}: "
                "it must have at least 5 frames and at least twice its overlap"
            )


def scenes(frames: Iterator[np.ndarray], first: int = 0, context: int = 0) -> Iterator[tuple[int, bool, np.ndarray]]:
    """(number, whether it starts a scene, frame) of each frame.

    Args:
        first: number of the first frame that is wanted.
        context: frames in `frames` before that one (common/scene_cuts.py: CONTEXT); only cuts are looked for in them.
    """
    finder, cuts = SceneCuts(), set()
    waiting: deque[tuple[int, np.ndarray]] = deque()
    for index, frame in enumerate(frames):
        cuts.update(finder.add(small_frame(frame)))
        if index >= context:
            waiting.append((index, frame))
        if len(waiting) > DELAY:
            known, earlier = waiting.popleft()
            yield first + known - context, known in cuts, earlier
    cuts.update(finder.finish())
    for known, earlier in waiting:
        yield first + known - context, known in cuts, earlier


def split_video(
    frames: Iterator[np.ndarray], windows: Windows, first: int = 0, context: int = 0
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cut a stream of frames into windows for the model; arguments as in `scenes`.

    Yields:
        (number of its first frame, how many of its first frames the window before also holds, uint8 (F, h, w, 3)).
        Windows of one scene overlap; a new scene starts a new window. The last window of a scene begins earlier, a
        multiple of a latent frame, where it would hold few frames otherwise.
    """
    held: list[np.ndarray] = []
    earlier: list[np.ndarray] = []  # of this scene, before `held`
    start, shared = first, 0

    def last() -> Iterator[tuple[int, int, np.ndarray]]:
        if len(held) > shared:
            missing = min(windows.frames - len(held), len(earlier)) // TEMPORAL_FACTOR * TEMPORAL_FACTOR
            yield start - missing, shared + missing, np.stack(earlier[len(earlier) - missing :] + held)

    for number, cut, frame in scenes(frames, first, context):
        if cut:
            yield from last()
            held, earlier, start, shared = [], [], number, 0
        held.append(frame)
        if len(held) == windows.frames:
            yield start, shared, np.stack(held)
            earlier, held = held[: windows.frames - windows.overlap], held[windows.frames - windows.overlap :]
            start, shared = number + 1 - windows.overlap, windows.overlap
    yield from last()


def run_windows(
    pipelines: Sequence[VSRPipeline], split: Iterator[tuple[int, int, np.ndarray]], **options: Any
) -> Iterator[tuple[int, int, np.ndarray, VSRResult]]:
    """Each window of `split_video` with its result, in order; every pipeline works on one window at a time.

    Which pipeline takes a window does not change the result: seeds belong to places in the video.
    """
    if len(pipelines) == 1:
        for window in split:
            yield *window, pipelines[0](window[2], first_frame=window[0], **options)
        return
    free: queue.SimpleQueue[VSRPipeline] = queue.SimpleQueue()
    for pipeline in pipelines:
        free.put(pipeline)

    def run(start: int, frames: np.ndarray) -> VSRResult:
        pipeline = free.get()
        try:
            return pipeline(frames, first_frame=start, **options)
        finally:
            free.put(pipeline)

    running: deque[tuple[tuple[int, int, np.ndarray], Future[VSRResult]]] = deque()
    with ThreadPoolExecutor(len(pipelines), thread_name_prefix="device") as pool:
        try:
            for window in split:
                running.append((window, pool.submit(run, window[0], window[2])))
                if len(running) == len(pipelines):
                    window, result = running.popleft()
                    yield *window, result.result()
            for window, result in running:
                yield *window, result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def upscale_video(
    pipelines: Sequence[VSRPipeline],
    frames: Iterator[np.ndarray],
    windows: Windows,
    *,
    first: int = 0,
    context: int = 0,
    statistics: dict[str, float],
    **options: Any,
) -> Iterator[tuple[np.ndarray, Place | None]]:
    """Upscaled clips in order, (F, 4h, 4w, 3), cross-faded where they overlapped: every frame of the video once.

    After some of them the video can be continued from a place: the window whose end is still to be cross-faded comes
    out the same again when it is read from its first frame.

    Args:
        pipelines: the same model on each device.
        frames, first, context: as in `scenes`.
        statistics: DiT evaluations and seconds are added to it; seconds of all devices.
        options: the pipeline's.
    """
    tail: np.ndarray | None = None
    split = split_video(frames, windows, first, context)
    for start, shared, window, result in run_windows(pipelines, split, **options):
        statistics["dit_evaluations"] = statistics.get("dit_evaluations", 0) + result.dit_evaluations
        for step, seconds in result.seconds.items():
            statistics[f"{step}_s"] = statistics.get(f"{step}_s", 0.0) + seconds
        upscaled = result.frames
        if tail is not None:
            if shared:
                upscaled = upscaled[shared - len(tail) :]  # the window before has decided on the others
                shared = len(tail)
                ramp = ((np.arange(shared, dtype=np.float32) + 0.5) / shared)[:, None, None, None]
                mixed = tail * (1 - ramp) + upscaled[:shared] * ramp
                tail, upscaled = np.rint(mixed).astype(upscaled.dtype), upscaled[shared:]
            yield tail, None
        keep = min(windows.overlap, len(upscaled))
        if len(upscaled) > keep:
            yield upscaled[: len(upscaled) - keep], Place(start, len(window) - keep)
        tail = upscaled[len(upscaled) - keep :]
    if tail is not None and len(tail):
        yield tail, None
