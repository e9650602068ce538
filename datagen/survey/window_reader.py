"""Windows of videos, read one after another without decoding anything twice that is still at hand.

A codec with long groups of pictures decodes hundreds of frames to reach one in the middle. The plan keeps neighbouring
windows together, so a reader that goes on from where the last window ended decodes most videos once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from common.decoded_frame import rgb
from common.lossless_clip import UnreadableVideo, opened
from common.video_probe import first_video

#: frames ahead that are decoded rather than sought to: within a usual group of pictures [ours]
MAX_SKIP = 64


class WindowReader:
    """Keeps the last video open and its last window in memory. Its frames are those of a fresh reader."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._path: str | None = None
        self._container: Any = None
        self._frames: Iterator[av.VideoFrame] = iter(())
        #: index of the frame that `_frames` gives next
        self._next = 0
        #: the last window and the index of its first frame
        self._window = np.empty((0, 0, 0, 3), np.uint8)
        self._start = 0

    def read(
        self, path: str, open_path: Callable[[], Any], name: str, start: int, pts: int | None, frames: int
    ) -> np.ndarray:
        """The window whose first frame has index `start` and time stamp `pts`, uint8 (F, H, W, 3) RGB.

        Args:
            path: what distinguishes one video from another.
            open_path: gives what PyAV opens, a path or a binary file.
            name: of the video, for errors.
            pts: None where frames have no time stamps; then, and where the container cannot seek to it, everything
                before the window is decoded.

        Raises:
            UnreadableVideo: it ends or breaks off before the window does.
        """
        if path != self._path:
            self.close()
            self._container, self._path = opened(open_path(), name), path
            self._rewind()
        try:
            window = self._go_on(start, pts, frames) if self._within_reach(start) else None
            if window is None:
                window = self._seek(start, pts, frames)
            if window is None:
                self._rewind()
                window = self._take(start, frames)
        except FFmpegError as error:
            self.close()
            raise UnreadableVideo(f"{name}: breaks off while it is decoded: {error}") from None
        except BaseException:
            self.close()
            raise
        if len(window) < frames:
            self.close()
            raise UnreadableVideo(
                f"{name}: ends {frames - len(window)} frames before the window from frame {start} does"
            )
        self._window, self._start = np.stack(window), start
        return self._window

    def close(self) -> None:
        """Forget the video."""
        if self._container is not None:
            self._container.close()
        self._forget()

    def _within_reach(self, start: int) -> bool:
        return bool(len(self._window)) and self._start <= start <= self._next + MAX_SKIP

    def _go_on(self, start: int, pts: int | None, frames: int) -> list[np.ndarray] | None:
        """From the last window and what follows it; None where time stamps say that it is another place."""
        kept = list(self._window[start - self._start :])[:frames] if start < self._next else []
        while self._next < start and next(self._frames, None) is not None:
            self._next += 1
        window = kept + self._take(self._next, frames - len(kept), None if kept else pts)
        return window if len(window) == frames else None

    def _seek(self, start: int, pts: int | None, frames: int) -> list[np.ndarray] | None:
        """From the key frame before `pts`; None where this container does not seek to frames."""
        if pts is None or start == 0:
            return None
        stream = first_video(self._container)
        self._container.seek(pts, stream=stream, backward=True)
        self._frames = self._container.decode(stream)
        for frame in self._frames:
            if frame.pts is None or frame.pts > pts:
                return None
            if frame.pts == pts:
                self._next = start + 1
                window = [rgb(frame), *self._take(start + 1, frames - 1)]
                return window if len(window) == frames else None
        return None

    def _rewind(self) -> None:
        stream = first_video(self._container)
        self._container.seek(0)
        self._frames, self._next = self._container.decode(stream), 0

    def _take(self, start: int, frames: int, pts: int | None = None) -> list[np.ndarray]:
        """Up to `frames` frames from index `start` on; none if the first has another time stamp than `pts`."""
        taken: list[np.ndarray] = []
        while len(taken) < frames and (frame := next(self._frames, None)) is not None:
            self._next += 1
            if self._next > start:
                if not taken and pts is not None and frame.pts != pts:
                    break
                taken.append(rgb(frame))
        return taken
