"""How many bits each channel of a written frame has."""

from typing import Literal

BitDepth = Literal[8, 10, 16]


def pipe_format(bits: BitDepth, *, alpha: bool) -> str:
    """FFmpeg's name for RGB pixels in a pipe: 8 bits a channel, or 16."""
    return ("rgba" if alpha else "rgb24") if bits == 8 else ("rgba64le" if alpha else "rgb48le")
