"""A video codec over a clip, in memory: frames into an encoder, its packets into a decoder, no container, no files."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from av.error import FFmpegError


class CodecFailure(Exception):
    """The codec did not give back the frames it was given."""


def through_codec(frames: list[np.ndarray], codec: str, bits_per_frame: int, preset: str) -> list[np.ndarray]:
    """BGR uint8 frames (H, W, 3) after `codec` at a mean of `bits_per_frame`.

    Frames of other sizes than the first are scaled to it (bicubic, as swscale does in the reference); odd sizes are
    padded to even ones and cut afterwards. One thread: x264's output depends on their number.
    """
    height, width = frames[0].shape[:2]
    padding = (0, height % 2, 0, width % 2)
    encoder: Any = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height = width + width % 2, height + height % 2
    encoder.pix_fmt = "yuv420p"
    # one frame per second, as in the reference: bits per second are bits per frame, and rate control is strict
    encoder.framerate = Fraction(1)
    encoder.time_base = Fraction(1)
    encoder.bit_rate = max(1000, int(bits_per_frame))  # x264 counts in kbit/s
    encoder.thread_count = 1
    if codec == "libx264":
        # mbtree=0: with SIMD and B-frames the macroblock tree reads memory that was never written (MALLOC_PERTURB_
        # shows it), and the same clip gave different streams. cabac=0: entropy coding loses nothing, and arithmetic
        # coding takes half of the time at these rates
        encoder.options = {"preset": preset, "x264-params": "mbtree=0:cabac=0"}
    decoder: Any = av.CodecContext.create("h264" if codec == "libx264" else codec, "r")
    decoder.thread_count = 1
    decoded: list[np.ndarray] = []
    try:
        for index, picture in enumerate([*frames, None]):
            packets = encoder.encode(
                None if picture is None else _frame(picture, index, (height, width), padding)
            )
            for packet in packets:
                decoded += [frame.to_ndarray(format="bgr24") for frame in decoder.decode(packet)]
        decoded += [frame.to_ndarray(format="bgr24") for frame in decoder.decode(None)]
    except FFmpegError as error:
        raise CodecFailure(f"{codec} at {width}x{height}, {bits_per_frame} bits a frame: {error}") from error
    if len(decoded) != len(frames):
        raise CodecFailure(f"{codec} at {width}x{height} gave {len(decoded)} frames for {len(frames)}")
    return [np.ascontiguousarray(picture[:height, :width]) for picture in decoded]


def _frame(
    picture: np.ndarray, index: int, size: tuple[int, int], padding: tuple[int, int, int, int]
) -> av.VideoFrame:
    if picture.shape[:2] != size:
        picture = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_CUBIC)
    if any(padding):
        picture = cv2.copyMakeBorder(picture, *padding, cv2.BORDER_REPLICATE)
    frame = av.VideoFrame.from_ndarray(picture, format="bgr24")
    frame.pts = index
    frame.time_base = Fraction(1)
    return frame
