"""Duplicate windows: near in the perceptual hashes of their first, middle and last frame.

Two windows of different sources are duplicates if each of the three hashes differs in fewer than `distance` bits. Of
duplicates the first window is kept. The search is exact: it finds what a comparison of all pairs finds.

It is multi-index hashing (Norouzi, Punjani, Fleet 2012) with the general pigeonhole principle (Qin et al. 2018). The 64
bits of the middle frame's hash are split into three bands. Hashes that differ in at most r bits differ in at most r1,
r2 or r3 bits within one band if (r1 + 1) + (r2 + 1) + (r3 + 1) = r + 1. For each band a table holds hashes by the
band's value, and each hash looks into the places that differ from its own in so few bits: 12,000 places at r = 12,
whatever the number of windows.

Time is linear while the bands' values, two to four million, are not crowded. Windows with equal hashes are compared
once. A crowd of nearly equal hashes that a table does not thin out is compared pair by pair: exact too, but quadratic
in the number of different hashes in the crowd.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

#: so many hashes are compared pair by pair: about as fast as the tables at that number
SMALL = 1 << 15
#: hashes looked up at once, so that what is worked on stays in the processor's cache
BLOCK = 1 << 15
#: a table that takes less than this share of the hashes does not thin out a crowd
MIN_SHARE = 1 / 16
BANDS = 3
BITS = 64

Pairs = tuple[np.ndarray, np.ndarray]


def find_duplicates(hashes: np.ndarray, structured: np.ndarray, sources: np.ndarray, distance: int) -> np.ndarray:
    """For each window the earliest kept window of another source that it duplicates.

    Windows whose middle frame has no structure duplicate nothing. A first or last frame without structure is like
    another one without, and unlike every frame with structure.

    Args:
        hashes: uint64 (N, 3) of the first, middle and last frame; any value where there is no structure.
        structured: bool (N, 3), False where a frame has no structure and so no hash.
        sources: int (N,), equal for windows of one source.
        distance: bits of 64, 0...16; 0 finds none.

    Returns:
        int64 (N,): index of the kept window, -1 for a window that is kept itself.
    """
    duplicate_of = np.full(len(hashes), -1, np.int64)
    windows = np.flatnonzero(structured[:, 1]) if distance else np.zeros(0, np.int64)
    if not len(windows):
        return duplicate_of
    distinct, group = _distinct(hashes[windows], structured[windows])
    neighbours, offsets = _neighbours(distinct, distance)
    sizes = np.bincount(group, minlength=len(distinct))
    compared = np.flatnonzero((sizes[group] > 1) | (offsets[group] < offsets[group + 1]))

    # of each group, the first window that is kept and the first of another source than that
    kept = np.full((2, len(distinct)), -1, np.int64)
    for index in compared:
        window, own = windows[index], group[index]
        near = np.append(neighbours[offsets[own] : offsets[own + 1]], own)
        first, second = kept[:, near]
        candidates = np.where(sources[first] != sources[window], first, second)
        candidates = candidates[(first >= 0) & (candidates >= 0)]
        if len(candidates):
            duplicate_of[window] = candidates.min()
        elif kept[0, own] < 0:
            kept[0, own] = window
        elif kept[1, own] < 0 and sources[kept[0, own]] != sources[window]:
            kept[1, own] = window
    return duplicate_of


def first_marked(hashes: np.ndarray, structured: np.ndarray, marked: np.ndarray, distance: int) -> np.ndarray:
    """For each window the first marked window within `distance` of it, of whatever source; itself if it is marked.

    Args:
        hashes, structured, distance: like `find_duplicates`.
        marked: bool (N,).

    Returns:
        int64 (N,): index of the marked window, -1 where none is near.
    """
    found = np.where(marked, np.arange(len(hashes)), -1)
    windows = np.flatnonzero(structured[:, 1]) if distance else np.zeros(0, np.int64)
    if not len(windows):
        return found
    distinct, group = _distinct(hashes[windows], structured[windows])
    neighbours, offsets = _neighbours(distinct, distance)
    nothing = len(hashes)
    first = np.full(len(distinct), nothing, np.int64)
    np.minimum.at(first, group, np.where(marked[windows], windows, nothing))
    near = first.copy()
    np.minimum.at(near, np.repeat(np.arange(len(distinct)), np.diff(offsets)), first[neighbours])
    near = np.where(near == nothing, -1, near)[group]
    found[windows] = np.where(marked[windows], windows, near)
    return found


def _distinct(hashes: np.ndarray, structured: np.ndarray) -> Pairs:
    """Different rows (first, middle, last, structured), uint64 (M, 4), and which of them each window has."""
    known = np.packbits(structured, axis=1).astype(np.uint64)  # uint64, or the columns together are float64
    rows = np.column_stack((np.where(structured, hashes, np.uint64(0)), known))
    distinct, group = np.unique(rows, axis=0, return_inverse=True)
    return distinct, group.reshape(-1)


def _neighbours(distinct: np.ndarray, distance: int) -> Pairs:
    """Of each row (first, middle, last, structured) the rows near it: their indices, and where each one's begin."""
    found: list[Pairs] = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for left, right in near_pairs(np.ascontiguousarray(distinct[:, 1]), distance - 1):
        near = distinct[left, 3] == distinct[right, 3]
        for column in (0, 2):
            near &= np.bitwise_count(distinct[left, column] ^ distinct[right, column]) < distance
        found.append((left[near], right[near]))
    left, right = (np.concatenate(side) for side in zip(*found, strict=True))
    left, right = np.concatenate((left, right)), np.concatenate((right, left))
    order = np.argsort(left, kind="stable")
    offsets = np.concatenate(([0], np.cumsum(np.bincount(left, minlength=len(distinct)))))
    return right[order], offsets


def near_pairs(values: np.ndarray, radius: int) -> Iterator[Pairs]:
    """All pairs of values that differ in at most `radius` bits, in pieces; a pair may come more than once.

    Args:
        values: uint64 (N,).
        radius: bits, 0...15.

    Yields:
        Indices of the one and of the other, int64 (n,).
    """
    if len(values) <= SMALL:
        yield from _all_pairs(values, np.arange(len(values)), radius)
        return
    # neighbouring bits are those of neighbouring frequencies: each band takes of all of them
    bits = np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    bits = bits[:, np.concatenate([np.arange(band, BITS, BANDS) for band in range(BANDS)])]
    spread = np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little")).view(np.uint64).reshape(-1)
    del bits
    share, more = divmod(radius + 1, BANDS)
    start = 0
    for band in range(BANDS):
        width = len(range(band, BITS, BANDS))
        band_radius = share + (band < more) - 1
        if band_radius >= 0:
            rotated = spread >> np.uint64(start) | spread << np.uint64((BITS - start) % BITS)
            yield from _band_pairs(rotated, width, band_radius, radius)
        start += width


def _all_pairs(values: np.ndarray, members: np.ndarray, radius: int) -> Iterator[Pairs]:
    """Near pairs among `members`, indices of `values`, by comparing all of them."""
    chosen = values[members]
    rows = max(1, BLOCK * 16 // max(1, len(chosen)))
    for start in range(0, len(chosen), rows):
        near = np.bitwise_count(chosen[start : start + rows, None] ^ chosen[None, start:]) <= radius
        left, right = np.nonzero(near)
        left, right = left[left < right], right[left < right]
        if len(left):
            yield members[start + left], members[start + right]


def _band_pairs(values: np.ndarray, width: int, band_radius: int, radius: int) -> Iterator[Pairs]:
    """Near pairs whose lowest `width` bits, the band, differ in at most `band_radius` bits.

    A table holds one value of each place. The rest looks into it too, and then goes into a table of its own.
    """
    keys = (values & np.uint64((1 << width) - 1)).astype(np.int64)
    rest = np.argsort(keys, kind="stable")
    masks = [
        [sum(1 << bit for bit in (highest, *lower)) for count in range(band_radius)
         for lower in itertools.combinations(range(highest), count)]
        for highest in range(width)
    ]  # fmt: skip
    while len(rest) > SMALL:
        first = np.diff(keys[rest], prepend=-1) != 0
        if np.count_nonzero(first) < MIN_SHARE * len(rest):
            break
        layer, rest = rest[first], rest[~first]
        # an empty place holds a value that differs from all that look there in `width` - `band_radius` bits at least
        table = ~np.arange(1 << width, dtype=np.uint64)
        table[keys[layer]] = values[layer]
        yield from _look_up(values, keys, rest, [0], table, layer, radius)
        for highest, group in enumerate(masks):
            if group:
                # the other half of the layer is looked up by this one
                half = layer[keys[layer] >> highest & 1 == 0]
                yield from _look_up(values, keys, np.concatenate((half, rest)), group, table, layer, radius)
    yield from _all_pairs(values, rest, radius)


def _look_up(
    values: np.ndarray,
    keys: np.ndarray,
    members: np.ndarray,
    masks: list[int],
    table: np.ndarray,
    layer: np.ndarray,
    radius: int,
) -> Iterator[Pairs]:
    """Near pairs of `members` with what the table holds where the key differs by one of the masks."""
    member_keys, member_values, layer_keys = keys[members], values[members], keys[layer]
    place, found = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.uint64)
    differing, near = np.empty(BLOCK, np.uint8), np.empty(BLOCK, bool)
    for start in range(0, len(members), BLOCK):
        block_keys, block_values = member_keys[start : start + BLOCK], member_values[start : start + BLOCK]
        size = len(block_keys)
        p, f, d, n = place[:size], found[:size], differing[:size], near[:size]
        for mask in masks:
            np.bitwise_xor(block_keys, mask, out=p)
            np.take(table, p, out=f, mode="clip")  # in range anyway; any other mode copies
            np.bitwise_xor(f, block_values, out=f)
            np.bitwise_count(f, out=d)
            np.less_equal(d, radius, out=n)
            hits = np.flatnonzero(n)
            if len(hits):
                yield members[start + hits], layer[np.searchsorted(layer_keys, p[hits])]
