"""Overlapping windows along one axis, and putting them together again without seams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def spans(length: int, window: int | None, overlap: int) -> Iterator[range]:
    """Cover 0…length with windows of equal size that overlap by at least `overlap`.

    One window if `window` is None or large enough. Windows start on multiples of 16 (pixels) where `window` and
    `overlap` are such, because the last one is moved back by a multiple of the rest's stride.
    """
    if window is None or window >= length:
        yield range(0, length)
        return
    stride = max(1, window - overlap)
    start = 0
    while start + window < length:
        yield range(start, start + window)
        start += stride
    yield range(length - window, length)


def blend_windows(parts: Iterable[tuple[range, Tensor]], length: int, axis: int) -> Tensor:
    """Put windows together along `axis`, cross-fading linearly where consecutive ones overlap.

    Only the two windows at a border exist at a time; a lone window is returned as it is.
    """
    result: Tensor | None = None
    end = 0
    for span, part in parts:
        if result is None:
            if len(span) == length:
                return part
            shape = list(part.shape)
            shape[axis] = length
            result = part.new_empty(shape)
        overlap = end - span.start
        if overlap > 0:
            ramp = (torch.arange(overlap, device=part.device, dtype=part.dtype) + 0.5) / overlap
            ramp = ramp.reshape(-1, *([1] * (part.ndim - 1 - axis)))
            old = result.narrow(axis, span.start, overlap)
            old.lerp_(part.narrow(axis, 0, overlap), ramp.expand_as(old))
            result.narrow(axis, end, span.stop - end).copy_(part.narrow(axis, overlap, span.stop - end))
        else:
            result.narrow(axis, span.start, len(span)).copy_(part)
        end = span.stop
    if result is None or end != length:
        raise ValueError(f"windows end at {end}, not {length}")
    return result


def in_tiles(
    shape: tuple[int, ...], tile: int | None, overlap: int, compute: Callable[[slice, slice], Tensor]
) -> Tensor:
    """Run `compute` on spatial tiles of an output of `shape` (C, T, h, w) and blend; all at once without tiles."""
    height, width = shape[2:]

    def row(rows: range) -> Iterator[tuple[range, Tensor]]:
        for columns in spans(width, tile, overlap):
            yield columns, compute(slice(rows.start, rows.stop), slice(columns.start, columns.stop))

    strips = ((rows, blend_windows(row(rows), width, axis=4)) for rows in spans(height, tile, overlap))
    return blend_windows(strips, height, axis=3)
