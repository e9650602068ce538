"""A video codec over a clip, in memory: frames into an encoder, its packets into a decoder, no container, no files."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import av
import cv2
import numpy as np
from av.error import FFmpegError
from pydantic import Field

from common.config import Section
from datagen.degradation.operation import Drawn, Frames, HrShape, Operation, Range, choose

Codec = Literal["libx264", "mpeg4"]
#: RealBasicVSR draws from libx264, h264 and mpeg4; ffmpeg's h264 encoder is libx264
CODEC_WEIGHTS: dict[Codec, float] = {"libx264": 2 / 3, "mpeg4": 1 / 3}
#: HR pixels at which a recipe's bits per frame hold [peer: RealBasicVSR trains on crops of 256 x 256]
CODEC_REFERENCE_PIXELS = 256 * 256


class CodecConfig(Section):
    """A video codec over all frames of the clip [peer: RealBasicVSR]."""

    #: by encoder: relative weight
    weights: dict[Codec, float] = Field(default_factory=lambda: dict(CODEC_WEIGHTS))
    #: mean bits per frame at an HR clip of 256 x 256 px; scaled with the pixels of the HR clip
    bits_per_frame: Range = (1e4, 1e5)
    #: x264's preset. RealBasicVSR runs `medium`; `superfast` is within 0.2 dB of it at the same bits, and six times
    #: as fast without arithmetic coding (benchmarks/degrade.py) [ours]
    preset: str = "superfast"


class VideoCompression(Operation):
    """Encoded and decoded at a drawn number of bits per frame."""

    name = "codec"
    config = CodecConfig

    def draw(self, config: CodecConfig, shape: HrShape, rng: np.random.Generator) -> Drawn:
        bits = rng.uniform(*config.bits_per_frame) * (shape.height * shape.width) / CODEC_REFERENCE_PIXELS
        codec = choose(rng, dict(config.weights))
        return {"codec": codec, "bits_per_frame": int(bits), "preset": config.preset}

    def apply(self, drawn: Drawn, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
        return through_codec(frames, drawn["codec"], drawn["bits_per_frame"], drawn["preset"])

    def describe(self, drawn: Drawn) -> str:
        return f"codec {drawn['codec']} {drawn['bits_per_frame']} bit/frame"


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
        for index, image in enumerate([*frames, None]):
            packets = encoder.encode(None if image is None else _frame(image, index, (height, width), padding))
            for packet in packets:
                decoded += [frame.to_ndarray(format="bgr24") for frame in decoder.decode(packet)]
        decoded += [frame.to_ndarray(format="bgr24") for frame in decoder.decode(None)]
    except FFmpegError as error:
        raise CodecFailure(f"{codec} at {width}x{height}, {bits_per_frame} bits a frame: {error}") from error
    if len(decoded) != len(frames):
        raise CodecFailure(f"{codec} at {width}x{height} gave {len(decoded)} frames for {len(frames)}")
    return [np.ascontiguousarray(image[:height, :width]) for image in decoded]


def _frame(image: np.ndarray, index: int, size: tuple[int, int], padding: tuple[int, int, int, int]) -> av.VideoFrame:
    if image.shape[:2] != size:
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)
    if any(padding):
        image = cv2.copyMakeBorder(image, *padding, cv2.BORDER_REPLICATE)
    frame = av.VideoFrame.from_ndarray(image, format="bgr24")
    frame.pts = index
    frame.time_base = Fraction(1)
    return frame
