"""Session: upscale a video whose frames come bit by bit, with the windows and the result of `upscale_video`.

with Session(pipeline, seed=0) as session:
    for frames in camera:
        show(session.step(frames))
    show(session.finish())
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from common.scale import SCALE
from pipeline.video_windows import Windows, upscale_video
from pipeline.vsr_pipeline import VSRPipeline


class _LeftError(Exception):
    """The caller left before `finish`."""


class Session:
    """One video on its way; `pipeline` works in a thread, only while `step` or `finish` waits for it.

    Use as a context manager: an exception inside ends the thread. After an error of the pipeline, it has ended too.
    """

    def __init__(self, pipeline: VSRPipeline, windows: Windows | None = None, **options: Any) -> None:
        """
        Args:
            windows: None: as long and with the overlap that the command has by default.
            options: the pipeline's.
        """
        #: DiT evaluations and seconds, as of `upscale_video`
        self.statistics: dict[str, float] = {}
        self._pipeline, self._windows, self._options = pipeline, windows or Windows(), options
        self._shape: tuple[int, ...] = (0, 0, 3)
        self._kind: np.dtype | None = None
        self._ended = False
        #: frames to go on with; None: no more
        self._given: queue.SimpleQueue[np.ndarray | _LeftError | None] = queue.SimpleQueue()
        #: clips; None: more come when there are more frames
        self._made: queue.SimpleQueue[np.ndarray | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="session", daemon=True)
        self._thread.start()

    def step(self, frames: np.ndarray) -> np.ndarray:
        """Go on with the next frames of the video.

        Args:
            frames: uint8, or uint16 in 0…65535, (F, h, w, 3) RGB, any F, of one size; they are copied.

        Returns:
            What can be decided now, (F', 4h, 4w, 3); F' is 0 until a window is complete.

        Raises:
            ValueError: another dtype, shape or size, or the session has ended.
        """
        known = frames.dtype in (np.uint8, np.uint16) and self._kind in (None, frames.dtype)
        if frames.ndim != 4 or frames.shape[3] != 3 or not known:
            kind = self._kind or "uint8 or uint16"
            raise ValueError(f"expected {kind} (F, h, w, 3), got {frames.dtype} {frames.shape}")
        if self._kind is not None and frames.shape[1:] != self._shape:
            raise ValueError(f"frames of shape {frames.shape[1:]} in a video of {self._shape}")
        self._shape, self._kind = frames.shape[1:], frames.dtype
        return self._exchange(frames.copy())

    def finish(self) -> np.ndarray:
        """The rest of the video, (F', 4h, 4w, 3); the session ends.

        Raises:
            ValueError: it has ended before.
        """
        rest = self._exchange(None)
        self._ended = True
        return rest

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._given.put(_LeftError())
        self._ended = True
        self._thread.join()

    def _exchange(self, frames: np.ndarray | None) -> np.ndarray:
        if self._ended:
            raise ValueError("the session has ended; begin another one")
        self._given.put(frames)
        height, width = (SCALE * side for side in self._shape[:2])
        kind = np.uint8 if self._options.get("bit_depth", 8) == 8 else np.uint16
        clips = [np.empty((0, height, width, 3), kind)]
        while (clip := self._made.get()) is not None:
            if isinstance(clip, BaseException):
                self._ended = True
                raise clip
            clips.append(clip)
        return np.concatenate(clips)

    def _work(self) -> None:
        try:
            for clip, _ in upscale_video(
                [self._pipeline], self._frames(), self._windows, statistics=self.statistics, **self._options
            ):
                self._made.put(clip)
            self._made.put(None)
        except _LeftError:
            pass
        except BaseException as error:
            self._made.put(error)

    def _frames(self) -> Iterator[np.ndarray]:
        while (frames := self._given.get()) is not None:
            if isinstance(frames, _LeftError):
                raise frames
            yield from frames
            self._made.put(None)  # `upscale_video` asks for more: it has made all that it can of these
