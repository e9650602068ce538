"""The README's image: details of two held-out clips at 1:1, from the frames that score.py saved.

python benchmarks/effect/readme_image.py --frames FOLDER/frames --output docs/images/effect.png [--method shipped]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, from anywhere

from benchmarks.effect.held_out import CLIPS
from benchmarks.effect.score import SHOWN, save_image
from common.errors import UserError, run_command
from metrics.labelled_grid import labelled_grid

#: clip -> the detail's left edge, px; details are as high as the clip
DETAILS = {"bikes-cyclist": 222, "city-towers": 110}
WIDTH = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=Path, required=True, help="folder `frames` of score.py's output")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", default="shipped", help="score.py's name of the model")
    parser.add_argument("--clips", type=Path, help="folder of the clips' files, instead of the installed wheels")
    arguments = parser.parse_args()
    columns = {
        "bicubic": "bicubic", "DUO-VSR small, one step": arguments.method,
        "Real-ESRGAN x4plus": "realesrgan-x4plus", "truth": None,
    }  # fmt: skip
    details = []
    for clip in (clip for clip in CLIPS if clip.name in DETAILS):
        for label, method in columns.items():
            file = arguments.frames / f"{clip.name}-{method}.png"
            if method and not file.is_file():
                raise UserError(f"no {file}; run benchmarks/effect/score.py first, or choose another --method")
            image = Image.open(file) if method else Image.fromarray(clip.frames(arguments.clips)[SHOWN])
            left = DETAILS[clip.name]
            details.append((label, image.convert("RGB").crop((left, 0, left + WIDTH, image.height))))
    save_image(labelled_grid(details, columns=len(columns)), arguments.output)


if __name__ == "__main__":
    run_command(main)
