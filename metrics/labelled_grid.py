"""Images in rows and columns, each under its name, pixel for pixel."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

#: px between images, and of the name above each
MARGIN, LABEL = 4, 22


def labelled_grid(images: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """RGB; row by row, each row as high as its highest image, all columns as wide as the widest."""
    width = max(image.width for _, image in images) + MARGIN
    rows = [images[first : first + columns] for first in range(0, len(images), columns)]
    heights = [LABEL + max(image.height for _, image in row) for row in rows]
    sheet = Image.new("RGB", (min(columns, len(images)) * width - MARGIN, sum(heights)), (255, 255, 255))
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(16), 0
    for row, height in zip(rows, heights, strict=True):
        for column, (name, image) in enumerate(row):
            draw.text((column * width + 2, y), name, (20, 20, 20), font)
            sheet.paste(image, (column * width, y + LABEL))
        y += height
    return sheet
