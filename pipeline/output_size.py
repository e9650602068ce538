"""Any output size: which size the model is given, and which is written."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from common.errors import UserError
from common.scale import SCALE

#: the model's result is at most so many times the size that is written: beyond it, work is thrown away [ours]
LARGEST_SURPLUS = 2
#: H.264 takes no larger side
LARGEST_SIDE = 16384


@dataclass(frozen=True)
class OutputSize:
    """(width, height) in pixels of what the model is given and of what is written; the model enlarges ×4."""

    model_input: tuple[int, int]
    output: tuple[int, int]
    #: of one output pixel, so that the video keeps its shape on the screen
    sample_aspect_ratio: Fraction = Fraction(1)


def choose_size(
    width: int,
    height: int,
    sample_aspect_ratio: Fraction = Fraction(1),
    *,
    scale: float | None = None,
    lines: int | None = None,
    size: tuple[int, int] | None = None,
    max_size: int | None = None,
    even: bool = True,
) -> OutputSize:
    """At most one of `scale`, `lines` and `size`; without any ×4.

    The model works on the source as it is. Where four times that is more than twice the output, the source is shrunk
    first to what gives twice the output. The result is brought to the output's size by a Lanczos filter.

    Args:
        scale: of both sides.
        lines: output height; the width follows.
        size: output width and height; pixels become non-square where their ratio is not the source's.
        max_size: neither side is larger; both shrink by the same factor.
        even: sides are rounded to even numbers, which 4:2:0 video has.

    Raises:
        UserError: a size below 8 px or above 16384 px.
    """
    if size is not None:
        wanted = (Fraction(size[0]), Fraction(size[1]))
    else:
        factor = Fraction(SCALE) if scale is None else Fraction(scale)
        factor = factor if lines is None else Fraction(lines, height)
        wanted = (width * factor, height * factor)
    if max_size is not None:
        shrink = min(Fraction(1), Fraction(max_size) / max(wanted))
        wanted = (wanted[0] * shrink, wanted[1] * shrink)
    exact = scale is None and lines is None and size is None and max_size is None
    output = (width * SCALE, height * SCALE)
    if not exact:
        step = 2 if even else 1
        output = (_side(wanted[0], step, max_size), _side(wanted[1], step, max_size))
    if min(output) < 8 or max(output) > LARGEST_SIDE:
        raise UserError(
            f"an output of {output[0]}x{output[1]}: sides are 8 to {LARGEST_SIDE} px; "
            "change --scale, --height, --size or --max-size"
        )
    surplus = max(
        Fraction(LARGEST_SURPLUS * out, SCALE * side) for out, side in zip(output, (width, height), strict=True)
    )
    factor = min(Fraction(1), surplus)
    given = (max(1, round(width * factor)), max(1, round(height * factor)))
    ratio = (
        sample_aspect_ratio if size is None else sample_aspect_ratio * Fraction(width * output[1], height * output[0])
    )
    return OutputSize(given, output, ratio)


def parse_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT`.

    Raises:
        ValueError: another form (argparse names the option).
    """
    width, height = (int(side) for side in text.lower().split("x"))
    return width, height


def _side(value: Fraction, step: int, largest: int | None) -> int:
    """A multiple of `step`."""
    side = step * round(value / step)
    return side - step if largest is not None and side > largest else side
