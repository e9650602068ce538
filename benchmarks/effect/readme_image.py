"""The README's picture: details of two held-out clips at 1:1, from the frames that score.py saved.

python benchmarks/effect/readme_image.py --frames FOLDER/frames --output docs/images/effect.png [--method shipped]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, from anywhere

from benchmarks.effect.held_out import CLIPS
from benchmarks.effect.score import SHOWN
from common.errors import UserError, run_command

#: clip -> the detail's left edge, px; details are as high as the clip
DETAILS = {"bikes-cyclist": 222, "city-towers": 110}
WIDTH, MARGIN, LABEL = 224, 4, 22


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
    rows = []
    for clip in (clip for clip in CLIPS if clip.name in DETAILS):
        box = (DETAILS[clip.name], 0, DETAILS[clip.name] + WIDTH)
        images = []
        for method in columns.values():
            file = arguments.frames / f"{clip.name}-{method}.png"
            if method and not file.is_file():
                raise UserError(f"no {file}; run benchmarks/effect/score.py first, or choose another --method")
            image = Image.open(file) if method else Image.fromarray(clip.frames(arguments.clips)[SHOWN])
            images.append(image.convert("RGB").crop((*box, image.height)))
        rows.append(images)
    height = rows[0][0].height + MARGIN
    sheet = Image.new("RGB", (len(columns) * (WIDTH + MARGIN) - MARGIN, LABEL + len(rows) * height - MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, label in enumerate(columns):
        draw.text((column * (WIDTH + MARGIN) + 2, 2), label, (20, 20, 20), font)
        for row, images in enumerate(rows):
            sheet.paste(images[column], (column * (WIDTH + MARGIN), LABEL + row * height))
    sheet.save(arguments.output)


if __name__ == "__main__":
    run_command(main)
