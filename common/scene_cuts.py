"""Scene cuts: one definition for datagen, whose windows never hold one, and upscale, which starts a new window there.

PySceneDetect's AdaptiveDetector: a frame starts a scene if it differs from the one before `threshold` times as much as
the frames around it do, on average. A flash is no cut: after one or two frames the scene is the one before again.
"""

from __future__ import annotations

import cv2
import numpy as np

#: width at which frames are compared, px [ours]
WIDTH = 256
#: how many times the change around it [PySceneDetect's default]
THRESHOLD = 3.0
#: frames after a cut until it is known: the detector looks at two on each side
DELAY = 2
#: frames that a flash lasts at most
FLASH_FRAMES = 2
#: a frame is the one before the flash again if it differs from it by less than this share of the flash's change [ours]
FLASH_SIMILARITY = 0.5
#: frames before a place in a video that the detector has to have seen there to decide as it did without a break
CONTEXT = 4


class SceneCuts:
    """Takes one frame after the other."""

    def __init__(self, *, threshold: float = THRESHOLD, min_scene_frames: int = 1, frame_rate: float = 25.0) -> None:
        """
        Args:
            min_scene_frames: a cut that soon after another one is none.
        """
        from scenedetect import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector

        self._timecode, self._frame_rate = FrameTimecode, frame_rate
        self._detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=min_scene_frames)
        self._count = 0
        self._recent: dict[int, np.ndarray] = {}

    def add(self, small: np.ndarray) -> list[int]:
        """Cuts known after one more frame, uint8 (h, `WIDTH`, 3) BGR: indices of frames that start a scene."""
        found = self._detector.process_frame(self._timecode(self._count, fps=self._frame_rate), small)
        self._recent[self._count] = small
        self._recent.pop(self._count - DELAY - FLASH_FRAMES - 2, None)
        self._count += 1
        return [cut.frame_num for cut in found if not self._flash(cut.frame_num)]

    def finish(self) -> list[int]:
        """Cuts known only at the end of the video."""
        if not self._count:
            return []
        found = self._detector.post_process(self._timecode(self._count - 1, fps=self._frame_rate))
        return [cut.frame_num for cut in found if not self._flash(cut.frame_num)]

    def _flash(self, number: int) -> bool:
        """Whether a flash begins or ends with this frame."""
        change = self._difference(number - 1, number)
        returns = [(number - 1, number + length) for length in range(1, FLASH_FRAMES + 1)]
        returned = [(number - 1 - length, number) for length in range(1, FLASH_FRAMES + 1)]
        pairs = [pair for pair in returns + returned if pair[0] in self._recent and pair[1] in self._recent]
        return any(self._difference(*pair) < FLASH_SIMILARITY * change for pair in pairs)

    def _difference(self, first: int, second: int) -> float:
        return float(cv2.absdiff(self._recent[first], self._recent[second]).mean())


def small_height(height: int, width: int) -> int:
    """Height of a frame of this size once it is `WIDTH` wide."""
    return max(8, round(height * WIDTH / width))


def small_frame(frame: np.ndarray) -> np.ndarray:
    """uint8, or uint16 in 0…65535, (H, W, 3) RGB as `SceneCuts.add` takes it."""
    frame = frame if frame.dtype == np.uint8 else (frame >> 8).astype(np.uint8)
    size = (WIDTH, small_height(*frame.shape[:2]))
    return cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
