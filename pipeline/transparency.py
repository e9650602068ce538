"""Transparency of a video: the model sees frames without it, and clips get it back, enlarged as z_LR's pixels are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from common.bit_depth import BitDepth
from pipeline.model.vae import to_frames, upsample_low_resolution
from pipeline.video_windows import Place


class Transparency:
    """Of one stream of frames, each of which comes out once."""

    def __init__(self, context: int, bit_depth: BitDepth) -> None:
        """
        Args:
            context: number of the first frames, of which no upscaled ones come.
            bit_depth: of the clips.
        """
        self._context, self._bit_depth = context, bit_depth
        self._waiting: deque[np.ndarray] = deque()

    def taken_from(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """RGBA frames (h, w, 4) as RGB."""
        for number, frame in enumerate(frames):
            if number >= self._context:
                self._waiting.append(frame[..., 3:])
            yield np.ascontiguousarray(frame[..., :3])

    def given_to(self, clips: Iterator[tuple[np.ndarray, Place | None]]) -> Iterator[tuple[np.ndarray, Place | None]]:
        """Clips (F, 4h, 4w, 3) with the transparency of their frames: (F, 4h, 4w, 4)."""
        for clip, place in clips:
            alpha = np.stack([self._waiting.popleft() for _ in clip])
            enlarged = to_frames(upsample_low_resolution(alpha), self._bit_depth).numpy()
            yield np.concatenate([clip, enlarged], axis=-1), place
