"""Lossless clips in memory or on disk, and PyAV's frames of any video.

The clips inside samples are FFV1 in Matroska: lossless in RGB, intra-frame, decoded by any FFmpeg.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from common.atomic import write_atomic
from common.decoded_frame import rgb
from common.errors import UserError
from common.video_probe import first_video


class UnreadableVideo(UserError):
    """A file that is no video, or one that breaks off while it is decoded."""


def opened(source: Any, name: str) -> Any:
    """PyAV's container of a path or binary file object, decoding in one thread.

    Raises:
        UnreadableVideo: nothing FFmpeg knows, or nothing with frames.
    """
    try:
        container = av.open(f"file:{source}" if isinstance(source, str) and "://" not in source else source)
    except (FFmpegError, ValueError) as error:
        raise UnreadableVideo(f"{name}: not a video FFmpeg can read ({getattr(error, 'strerror', error)})") from None
    stream = first_video(container)
    if stream is None:
        container.close()
        raise UnreadableVideo(f"{name}: holds no video stream")
    stream.thread_type = "NONE"
    return container


def decode(source: Any, name: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Frames start...stop-1 as uint8 (H, W, 3) RGB, counted from the first, whatever the key frames.

    Decodes from the beginning: frame-exact for every container, and the same frames whichever window is asked for.

    Raises:
        UnreadableVideo: while iterating, where decoding fails.
    """
    with opened(source, name) as container:
        stream = first_video(container)
        try:
            for index, frame in enumerate(container.decode(stream)):
                if stop is not None and index >= stop:
                    return
                if index >= start:
                    yield rgb(frame)
        except FFmpegError as error:
            raise UnreadableVideo(f"{name}: breaks off while it is decoded: {error}") from None


def read_window(path: str | os.PathLike[str], start: int, frames: int | None) -> np.ndarray:
    """uint8 (F, H, W, 3) RGB.

    Raises:
        UserError: not a readable video, or too short.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    stop = None if frames is None else start + frames
    clip = list(decode(os.fspath(path), os.fspath(path), start, stop))
    if not clip or (frames is not None and len(clip) < frames):
        wanted = "any frame" if frames is None else f"frames {start}...{start + frames - 1}"
        raise UserError(f"{path} is too short for {wanted}: it ends after frame {start + len(clip) - 1}")
    return np.stack(clip)


def encode_bytes(clip: np.ndarray) -> bytes:
    """A lossless Matroska file (FFV1, RGB) of uint8 (F, H, W, 3); the same bytes for the same clip."""
    buffer = io.BytesIO()
    # bitexact: no creation date, no random track identifiers
    with av.open(buffer, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height = clip.shape[2], clip.shape[1]
        stream.pix_fmt = "bgr0"  # what FFV1 takes for 8-bit RGB
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        stream.codec_context.thread_count = 1
        _mux(container, stream, clip)
    return buffer.getvalue()


def decode_bytes(content: bytes) -> np.ndarray:
    """uint8 (F, H, W, 3) of a file that `encode_bytes` made."""
    return np.stack(list(decode(io.BytesIO(content), "clip member")))


def write_lossless(path: str | os.PathLike[str], clip: np.ndarray) -> None:
    """Write a clip without loss, atomically: x264 in RGB for `.mp4`, else `encode_bytes`."""
    path = Path(path)
    write_atomic(path, _lossless_mp4(clip) if path.suffix.lower() == ".mp4" else encode_bytes(clip))


def _lossless_mp4(clip: np.ndarray) -> bytes:
    """x264 in RGB at quantiser 0: lossless, and players that know High 4:4:4 show it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264rgb", rate=24, options={"qp": "0", "preset": "veryfast"})
        stream.width, stream.height = clip.shape[2], clip.shape[1]
        stream.pix_fmt = "rgb24"
        _mux(container, stream, clip)
    return buffer.getvalue()


def _mux(container: Any, stream: Any, clip: np.ndarray) -> None:
    for frame in clip:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode(None))
