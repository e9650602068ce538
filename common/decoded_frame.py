"""PyAV's frames as pixels, like those of common/video_reader.py: exact colours, turned upright."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.video_probe import BT601, BT709, UNSPECIFIED, untagged_matrix

#: swscale's bicubic, accurate_rnd, full_chroma_int and full_chroma_inp: without them it darkens by a level and repeats
#: chroma samples
EXACT = 0x4 | 0x40000 | 0x2000 | 0x4000
#: swscale's numbers for the matrices of untagged video
_SWSCALE = {BT709: 1, BT601: 5}


def rgb(frame: Any) -> np.ndarray:
    """uint8 (H, W, 3) RGB, turned by the quarter turns that the file asks for.

    Untagged video is BT.709 from 1280 px of width or 720 lines on and BT.601 below.
    """
    matrix = None
    if int(frame.colorspace) == UNSPECIFIED and frame.format.name.startswith("yuv"):
        matrix = _SWSCALE[untagged_matrix(*upright_size(frame))]
    pixels = frame.reformat(format="rgb24", interpolation=EXACT, src_colorspace=matrix).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns(frame)))


def quarter_turns(frame: Any) -> int:
    """Counterclockwise, 0…3; what is between is left as it is."""
    return round(frame.rotation / 90) % 4


def upright_size(frame: Any) -> tuple[int, int]:
    """(width, height) after turning."""
    return (frame.height, frame.width) if quarter_turns(frame) % 2 else (frame.width, frame.height)
