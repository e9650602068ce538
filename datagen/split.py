"""Training and held-out sources: validation looks at sources of which training saw nothing.

A source's side is decided by a hash of its video stream and the seed. So it depends on no other source and on no name,
and a collection may grow without moving an old source to the other side. A training source that shares a window with a
held-out one is left out, whole: a copy's other windows are copies too, though their hashes may not show it.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.seeding import derive_seed


def held_out_contents(contents: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """Those of `contents` whose sources are held out.

    Each is held out with probability `share`. Of two or more, at least one is held out and at least one is not: where
    the draws say otherwise, the lowest or the highest of them decides, the only case in which others matter.

    Args:
        contents: hashes of the sources' video streams (`SourceSurvey.content`).
        share: 0...1; 0 holds out none.
    """
    drawn = sorted((derive_seed(seed, "held out", content) / 2**63, content) for content in set(contents))
    if not share or len(drawn) < 2:
        return frozenset()
    below = {content for draw, content in drawn if draw < share}
    return frozenset((below | {drawn[0][1]}) - {drawn[-1][1]})
