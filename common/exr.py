"""EXR images: scene-linear light, which models that were trained on display pixels see through the sRGB curve.

FFmpeg decodes them, the library in PyAV's wheel. Primaries are taken as BT.709. Colours that EXR holds multiplied by
their transparency are read as they are, as over black.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError

from common.errors import UserError
from common.video_probe import url

#: of the curve's straight piece: its end in linear light and its slope (IEC 61966-2-1)
LINEAR_END, SLOPE = 0.0031308, 12.92


def is_exr(path: Path) -> bool:
    """By its suffix."""
    return path.suffix.lower() == ".exr"


def exr_header(path: Path) -> tuple[int, int, bool]:
    """Width and height of the display window, px, and whether it has transparency.

    Raises:
        UserError: no EXR.
    """
    frame = _frame(path)
    return frame.width, frame.height, any(component.is_alpha for component in frame.format.components)


def read_exr(path: Path) -> np.ndarray:
    """uint16 (H, W, 3) RGB as a display shows it; light below 0 and above 1 is clipped.

    Raises:
        UserError: no EXR, or a damaged one.
    """
    light = _frame(path).reformat(format="gbrpf32le").to_ndarray()
    light = np.clip(np.nan_to_num(light, posinf=1.0), 0, 1)
    curve = 1.055 * np.power(light, 1 / 2.4) - 0.055
    return np.rint(np.where(light <= LINEAR_END, SLOPE * light, curve) * 65535).astype(np.uint16)


def _frame(path: Path) -> av.VideoFrame:
    try:
        with av.open(url(path)) as container:
            return next(container.decode(video=0))
    except (FFmpegError, StopIteration, IndexError) as error:
        raise UserError(f"{path} is no EXR that FFmpeg decodes, or damaged ({error}); convert it") from None
