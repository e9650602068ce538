"""Survey of one video: decoded once, small, to learn its scenes and what each window is like.

The survey knows nothing of filters or crops: those are the plan's (datagen/plan.py), so that changing a threshold
does not mean decoding a million videos again.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np

from common.decoded_frame import upright_size
from common.lossless_clip import UnreadableVideo, opened
from common.scale import SCALE
from common.scene_cuts import WIDTH, SceneCuts, small_height
from common.video_probe import LARGEST_RATE, UNSPECIFIED, first_video
from datagen.config import ClipConfig
from datagen.sources import Source
from datagen.survey.perceptual_hash import THUMBNAIL, perceptual_hash
from datagen.survey.source_survey import SourceSurvey, Window

#: contrast and sharpness are measured on every n-th frame
DETAIL_EVERY = 4
#: frames before a window in which its content is looked for: 20 s at 25 frames/s, longer than a loop is [ours]
LOOK_BACK = 512
#: side of the frames that are compared then, px: the mean of a cell leaves little of a codec's noise
LOOK_BACK_SIDE = 16
#: frames of a window that are compared
COMPARED_FRAMES = 5
NEVER_SEEN = 255.0
#: luma, 0...255, up to which a pixel is one of a black bar [ours]
BLACK = 16
#: px within which a picture beside a black bar is lit across more than half of the frame
EDGE_PIXELS = 3


@dataclass
class _Features:
    """Of one frame."""

    pts: int | None
    luma: float
    contrast: float
    motion: float
    sharpness: float
    hash: int | None


def survey(source: Source, opened_source: Any, clip: ClipConfig) -> SourceSurvey:
    """Size, length, scenes and windows of a video.

    Args:
        opened_source: what PyAV opens, a path or a binary file.

    Raises:
        UnreadableVideo: no video, or it breaks off.
    """
    name = source.id
    features: list[_Features] = []
    tiny: list[np.ndarray] = []
    with opened(opened_source, name) as container:
        stream = first_video(container)
        rate = stream.average_rate or stream.guessed_rate
        finder = SceneCuts(threshold=clip.scene_threshold, frame_rate=float(rate or 25))
        cuts: set[int] = set()
        previous = None
        content = _content(stream)
        time_base = stream.time_base
        width = height = interlaced = 0
        transfer, brightest = UNSPECIFIED, np.zeros((1, 1), np.uint8)
        contrast = sharpness = 0.0
        try:
            for frame in _decoded(container, stream, content):
                width, height = upright_size(frame)
                interlaced += frame.interlaced_frame
                small = small_video_frame(frame)
                grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
                if not features:
                    transfer, brightest = int(frame.color_trc), np.zeros_like(grey)
                if grey.shape == brightest.shape:  # else its size has changed on the way
                    np.maximum(brightest, grey, out=brightest)
                thumbnail = to_thumbnail(grey)
                if len(features) % DETAIL_EVERY == 0:
                    contrast, sharpness = _detail(frame)
                if clip.respect_scenes:
                    cuts.update(finder.add(small))
                features.append(_measure(frame.pts, thumbnail, previous, contrast, sharpness))
                tiny.append(cv2.resize(thumbnail, (LOOK_BACK_SIDE, LOOK_BACK_SIDE), interpolation=cv2.INTER_AREA))
                previous = thumbnail
        except av.error.FFmpegError as error:
            raise UnreadableVideo(f"{name}: breaks off after {len(features)} frames: {error}") from None
        content.update(repr([frame.pts for frame in features]).encode())
    if not features:
        raise UnreadableVideo(f"{name}: holds no frame that can be decoded")
    if clip.respect_scenes:
        cuts.update(finder.finish())
    scene_starts = sorted(cut for cut in cuts if 0 < cut < len(features))
    starts = window_starts(len(features), scene_starts, clip.frames, clip.stride)
    frames = np.stack(tiny)
    return SourceSurvey(
        source,
        width,
        height,
        frames=len(features),
        frames_per_second=_frames_per_second(rate, [frame.pts for frame in features], time_base),
        content=content.hexdigest(),
        cuts=tuple(scene_starts),
        windows=tuple(_window(features, start, clip.frames, novelty(frames, start, clip.frames)) for start in starts),
        transfer=transfer,
        interlaced=round(interlaced / len(features), 3),
        bars=black_bars(brightest),
    )


def _frames_per_second(rate: Fraction | None, times: list[int | None], time_base: Fraction | None) -> float:
    """That of the header; where it has none, or a clock's, that of the frames' time stamps; 0 where they have none."""
    if rate and rate <= LARGEST_RATE:
        return float(rate)
    known = [time for time in times if time is not None]
    if time_base is None or len(known) < 2 or known[-1] <= known[0]:
        return 0.0
    return round((len(known) - 1) / float((known[-1] - known[0]) * time_base), 3)


def to_thumbnail(grey: np.ndarray) -> np.ndarray:
    """A grey frame (H, W) at 32 x 32 px, on which luma, motion and the perceptual hash are measured."""
    return cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)


def mean_measure(values: Iterable[float]) -> float:
    """Mean over the frames of a window, as thresholds are compared with it."""
    return round(float(np.mean(list(values))), 2)


def _content(stream: Any) -> Any:
    """A SHA-256 of the stream's decoder parameters; its packets are added later."""
    context = stream.codec_context
    parameters = (context.name, context.pix_fmt, context.width, context.height, context.color_range, context.colorspace)
    return hashlib.sha256(repr(parameters).encode() + bytes(context.extradata or b""))


def _decoded(container: Any, stream: Any, content: Any) -> Iterator[av.VideoFrame]:
    """All frames; the packets they come from are added to the hash `content`."""
    for packet in container.demux(stream):
        content.update(bytes(packet))
        yield from packet.decode()


def window_starts(frames: int, cuts: list[int], length: int, stride: int | None) -> list[int]:
    """First frames of windows that lie within one scene; `cuts` are the first frames of later scenes."""
    ends = [0, *cuts, frames]
    starts: list[int] = []
    for first, after in itertools.pairwise(ends):
        starts += range(first, after - length + 1, stride or length)
    return starts


def small_video_frame(frame: av.VideoFrame) -> np.ndarray:
    """uint8 (h, `WIDTH`, 3) BGR, as scenes are found and thumbnails made of it."""
    height = small_height(frame.height, frame.width)
    return frame.reformat(WIDTH, height, "bgr24", interpolation="FAST_BILINEAR").to_ndarray()


def black_bars(brightest: np.ndarray) -> float:
    """Part of the height or the width, whichever is more, that lies in two black bars of one size.

    A black video has none: that is another filter's matter, as is what is shown before a black ground.

    Args:
        brightest: the largest luma of each pixel in all frames, uint8 (h, w), 0...255.
    """
    lit = brightest > BLACK
    parts = []
    for share in (lit.mean(axis=1), lit.mean(axis=0)):
        sides = []
        for along in (share, share[::-1]):
            first = int((along > 0).argmax())
            # the picture begins with an edge across the frame; else something is shown before a black ground
            sides.append(first if (along[first : first + EDGE_PIXELS] > 0.5).any() else 0)
        parts.append(2 * min(sides) / len(share))
    return round(max(parts), 3)


def _detail(frame: av.VideoFrame) -> tuple[float, float]:
    """Contrast and sharpness, which a small frame does not tell."""
    grey = frame.to_ndarray(format="gray")
    return contrast_of(grey), float(cv2.Laplacian(grey, cv2.CV_16S).var())


def contrast_of(grey: np.ndarray) -> float:
    """Standard deviation of luma (H, W) at the size of LR: fine texture counts, as far as LR can show it."""
    height, width = (max(1, side // SCALE) for side in grey.shape)
    return float(cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA).std())


def _measure(
    pts: int | None, thumbnail: np.ndarray, previous: np.ndarray | None, contrast: float, sharpness: float
) -> _Features:
    motion = 0.0 if previous is None else float(cv2.absdiff(thumbnail, previous).mean())
    hashed = perceptual_hash(thumbnail)
    return _Features(pts, float(thumbnail.mean()), contrast, motion, sharpness, hashed)


def novelty(frames: np.ndarray, start: int, length: int) -> float:
    """How much a window differs from what came before it: little in a loop after its first turn, or in a still.

    The stretches that it is compared with end before it, so a slow change does not count as a repetition.

    Args:
        frames: luma of the source, uint8 (N, h, w), 0...255.
        start: first frame of the window.
        length: of the window, frames.

    Returns:
        Mean absolute difference from the most similar stretch of as many frames within `LOOK_BACK` frames, 0...255;
        255 where there is none.
    """
    first, last = max(0, start - LOOK_BACK), start - length
    if last < first:
        return NEVER_SEEN
    offsets = sorted({round(part) for part in np.linspace(0, length - 1, COMPARED_FRAMES)})
    differences = np.zeros(last - first + 1)
    for offset in offsets:
        earlier = frames[first + offset : last + offset + 1].astype(np.int16)
        differences += np.abs(earlier - frames[start + offset].astype(np.int16)).mean(axis=(1, 2))
    return round(float(differences.min()) / len(offsets), 3)


def _window(features: list[_Features], start: int, length: int, novelty: float) -> Window:
    frames = features[start : start + length]
    hashes = [frames[index].hash for index in (0, length // 2, -1)]
    return Window(
        start,
        frames[0].pts,
        luma=mean_measure(frame.luma for frame in frames),
        contrast=mean_measure(frame.contrast for frame in frames),
        motion=round(float(np.mean([frame.motion for frame in frames[1:]] or [0.0])), 3),
        sharpness=mean_measure(frame.sharpness for frame in frames),
        novelty=novelty,
        hashes=tuple(None if value is None else f"{value:016x}" for value in hashes),
    )
