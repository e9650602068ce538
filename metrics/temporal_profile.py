"""Temporal profiles: one row or column of pixels of every frame, side by side over time.

    python -m metrics.temporal_profile --clip HR=hr/000 --clip ours=out/000 --row 180 --output profile.png

Flicker shows as stripes across time, jitter as a saw. Pixels are those of the clip, not resized.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.atomic import atomic_file
from common.errors import UserError, run_command
from metrics.clips import Clip, open_clip
from metrics.labelled_grid import labelled_grid


def profile(clip: Clip, row: int | None = None, column: int | None = None) -> NDArray[np.uint8]:
    """uint8 (F, W, 3) of a row, time downwards; or (H, F, 3) of a column, time to the right.

    Raises:
        UserError: the line lies outside the frames, or the clip cannot be read.
    """
    line, sides = (row, clip.size.height) if column is None else (column, clip.size.width)
    if line is None or not 0 <= line < sides:
        raise UserError(f"{clip.path} is {clip.size}: give a --row or --column inside it, not {line}")
    lines = []
    for frame in clip.frames():
        pixels = frame[:, line] if column is None else frame[:, :, line]
        lines.append((255 * pixels.T).round().byte().numpy())
    return np.stack(lines, axis=0 if column is None else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw one row or column of pixels over time.")
    parser.add_argument("--clip", action="append", required=True, metavar="NAME=CLIP", help="repeatable")
    line = parser.add_mutually_exclusive_group(required=True)
    line.add_argument("--row", type=int, help="y in px from the top")
    line.add_argument("--column", type=int, help="x in px from the left")
    parser.add_argument("--max-frames", type=int, help="only the first frames")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()
    profiles = {}
    for value in arguments.clip:
        name, _, path = value.partition("=")
        if not name or not path or name in profiles:
            raise UserError(f"--clip {value}: give NAME=CLIP, every name once")
        profiles[name] = profile(open_clip(Path(path), arguments.max_frames), arguments.row, arguments.column)
    with atomic_file(arguments.output) as temporary:
        images = [(name, Image.fromarray(pixels)) for name, pixels in profiles.items()]
        labelled_grid(images, columns=1).save(temporary, "PNG")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    run_command(main)
