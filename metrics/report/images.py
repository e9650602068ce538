"""The images of a report as data URIs: frames, crops at 1:1 and doubled, and curves drawn by matplotlib."""

from __future__ import annotations

import base64
import io
import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.errors import UserError
from metrics.report.description import Curve, Series

#: frames above this many pixels are embedded as JPEG of high quality, to keep the page below tens of
#: megabytes; crops, where quality is judged, are always lossless
_LOSSLESS_PIXELS = 640 * 360

_COLOURS = ("#2f6fde", "#d9822b", "#2a9d6f", "#b5489a", "#7a7f87", "#c23b3b")


def image_uri(path: Path) -> str:
    """An image file as a data URI."""
    image = _open(path)
    return _encode(image, lossless=image.width * image.height <= _LOSSLESS_PIXELS)


def crop_uri(path: Path, box: tuple[int, int, int, int]) -> str:
    """The part (x, y, width, height) of an image, lossless.

    Raises:
        UserError: the box reaches outside the image.
    """
    image = _open(path)
    x, y, width, height = box
    if x < 0 or y < 0 or width < 1 or height < 1 or x + width > image.width or y + height > image.height:
        raise UserError(f"crop {list(box)} reaches outside {path} ({image.width}×{image.height})")
    return _encode(image.crop((x, y, x + width, y + height)), lossless=True)


@lru_cache(maxsize=16)
def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"no image {path} for the report") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} is not a readable image ({error})") from None


def _encode(image: Image.Image, *, lossless: bool) -> str:
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=92, subsampling=0)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def curve_svg(curve: Curve, base: Path) -> str:
    """A plot as inline SVG in the page's text colour; raw values are pale, their running mean is drawn over.

    Raises:
        UserError: a log that is missing, is no JSON lines, or has no such field.
    """
    # the object-oriented interface: no global state, no display
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # a fixed salt and no date make the SVG the same bytes every time
    with rc_context({"svg.hashsalt": "duo-vsr", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for index, series in enumerate(curve.series):
            x, y = read_series(series, base)
            colour = _COLOURS[index % len(_COLOURS)]
            window = max(1, len(y) // 30)
            if window > 1:
                axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
            axes.plot(x, running_mean(y, window), color=colour, linewidth=1.6, label=series.label)
        if curve.log_y:
            axes.set_yscale("log")
        axes.set_xlabel(curve.x_label)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curve.series) > 1:
            axes.legend(frameon=False, fontsize=8)
        axes.tick_params(labelsize=8)
        buffer = io.StringIO()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for attribute in ("width", "height"):  # the page decides the size, viewBox keeps the shape
        svg = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", svg, count=1)
    # black text and axes follow the page in its dark dress
    return svg.replace("#000000", "currentColor").replace('fill="black"', 'fill="currentColor"')


def read_series(series: Series, base: Path) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the lines that hold both and equal `where`; lines of other kinds are passed over."""
    path = base / series.file
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"no log {path} for the curve {series.label!r}") from None
    points = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):  # a run that is still writing, or was killed while it wrote
                continue
            raise UserError(f"{path}:{number} is not a JSON line") from None
        if not isinstance(record, dict) or any(record.get(key) != value for key, value in series.where.items()):
            continue
        if isinstance(record.get(series.x), (int, float)) and isinstance(record.get(series.y), (int, float)):
            points.append((record[series.x], record[series.y]))
    if not points:
        raise UserError(f"{path} has no line with {series.x} and {series.y} for the curve {series.label!r}")
    x, y = np.array(points, dtype=float).T
    return x, y


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of up to `window` values ending at each one."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    start = np.maximum(np.arange(len(values)) + 1 - window, 0)
    stop = np.arange(len(values)) + 1
    return (total[stop] - total[start]) / (stop - start)
