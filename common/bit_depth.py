"""How many bits each channel of a written frame has, and how FFmpeg takes and gives 16 of them."""

from typing import Literal

import numpy as np

BitDepth = Literal[8, 10, 16]

#: what swscale takes white to be where it makes luma and chroma of RGB with 16 bits a channel, and the other way
SWSCALE_WHITE = 255 << 8


def pipe_format(bits: BitDepth, *, alpha: bool) -> str:
    """FFmpeg's name for RGB pixels in a pipe: 8 bits a channel, or 16."""
    return ("rgba" if alpha else "rgb24") if bits == 8 else ("rgba64le" if alpha else "rgb48le")


def from_swscale(frame: np.ndarray) -> np.ndarray:
    """RGB or RGBA that swscale made of luma and chroma, uint16 (H, W, C): its white becomes 65535, in place."""
    colours = frame[..., :3]
    np.minimum(colours, SWSCALE_WHITE, out=colours)
    colours += colours >> 8
    return frame


def for_swscale(frame: np.ndarray) -> np.ndarray:
    """The other way round, for frames that are to become luma and chroma; a copy."""
    frame = frame.copy()
    frame[..., :3] -= frame[..., :3] >> 8
    return frame
