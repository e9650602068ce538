"""One image of a result: full frames above, the same detail of each enlarged below. The README shows it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MARGIN = 6
LABEL_HEIGHT = 26
INK, PAPER, FRAME = (20, 20, 20), (255, 255, 255), (220, 50, 40)


def contact_sheet(frames: dict[str, Path], crop: tuple[int, int, int, int], output: Path) -> None:
    """Write a PNG with one column per frame.

    Args:
        frames: label -> image; all of one size.
        crop: (x, y, width, height) of the detail, in pixels of the frames; marked in the first one.
    """
    x, y, crop_width, crop_height = crop
    images = {label: Image.open(path).convert("RGB") for label, path in frames.items()}
    width, height = next(iter(images.values())).size
    detail_height = round(crop_height * width / crop_width)
    sheet = Image.new(
        "RGB", ((width + MARGIN) * len(images) - MARGIN, LABEL_HEIGHT + height + MARGIN + detail_height), PAPER
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for column, (label, image) in enumerate(images.items()):
        left = column * (width + MARGIN)
        draw.text((left + 2, 1), label, INK, font)
        sheet.paste(image, (left, LABEL_HEIGHT))
        detail = image.crop((x, y, x + crop_width, y + crop_height))
        detail = detail.resize((width, detail_height), Image.Resampling.NEAREST)
        sheet.paste(detail, (left, LABEL_HEIGHT + height + MARGIN))
    draw.rectangle((x, LABEL_HEIGHT + y, x + crop_width, LABEL_HEIGHT + y + crop_height), outline=FRAME, width=2)
    temporary = output.with_suffix(".partial.png")
    sheet.save(temporary)
    temporary.replace(output)
