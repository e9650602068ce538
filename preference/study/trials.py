"""Who sees what: the pairs of a study and each rater's own order and sides, pure functions of seed and name."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from common.errors import UserError
from common.seeding import derive_seed

#: what a rater answers by: question -> its words on the page
QUESTIONS = {
    "fidelity": "Which one is more faithful to the input?",
    "quality": "Which one looks better: sharp, clean, natural, steady?",
    "overall": "Which one would you rather have?",
}
LEFT, SAME, RIGHT = CHOICES = ("left", "same", "right")


@dataclass(frozen=True)
class Pair:
    """Two methods on one clip, stacked in one video file so that they share a clock.

    Attributes:
        reference, other: methods; the result counts from the reference's side.
        file: the video's name, which tells nothing.
        top: the method in the file's upper panel; the other one begins at row `second_row`, the input at `input_row`.
        width, height: of one panel, px.
        input_size: (width, height) in px.
    """

    clip: str
    reference: str
    other: str
    file: str
    top: str
    width: int
    height: int
    second_row: int
    input_row: int
    input_size: tuple[int, int]
    frames: int


@dataclass(frozen=True)
class Trial:
    """One pair as one rater sees it; `left` and `right` are methods."""

    pair: Pair
    left: str
    right: str

    def shown(self) -> dict[str, Any]:
        """What the page is told: rows of the file, no method and no clip."""
        rows = {self.pair.top: 0}
        rows[self.right if self.left == self.pair.top else self.left] = self.pair.second_row
        known = ("file", "width", "height", "input_row", "input_size", "frames")
        fields = {name: value for name, value in asdict(self.pair).items() if name in known}
        return fields | {"left_row": rows[self.left], "right_row": rows[self.right]}


def draw_trials(pairs: Sequence[Pair], seed: int, rater: str, count: int | None = None) -> list[Trial]:
    """The trials of one rater, in order.

    Of each two methods, each is on the left equally often (one more at most). With `count`, that many trials are drawn,
    equally many (one more at most) of each two methods.
    """
    rng = random.Random(derive_seed("study trials", seed, rater))
    groups: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.reference, pair.other].append(pair)
    shuffled = list(groups.values())
    rng.shuffle(shuffled)
    for group in shuffled:
        rng.shuffle(group)
    drawn = [pair for row in zip_longest(*shuffled) for pair in row if pair is not None][:count]
    trials = []
    for group in shuffled:
        shown = [pair for pair in group if pair in drawn]
        half = len(shown) // 2
        sides = [True] * half + [False] * half + [rng.random() < 0.5] * (len(shown) % 2)
        rng.shuffle(sides)
        for pair, reference_left in zip(shown, sides, strict=True):
            left, right = (pair.reference, pair.other) if reference_left else (pair.other, pair.reference)
            trials.append(Trial(pair, left, right))
    rng.shuffle(trials)
    return trials


@dataclass(frozen=True)
class Study:
    """What `key.json` holds. It alone names the methods.

    Attributes:
        identity: repeated by every file of answers.
        trials_per_rater: None: all pairs.
    """

    identity: str
    seed: int
    trials_per_rater: int | None
    frame_rate: str
    pairs: tuple[Pair, ...]

    def trials(self, rater: str) -> list[Trial]:
        """See `draw_trials`."""
        return draw_trials(self.pairs, self.seed, rater, self.trials_per_rater)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"questions": QUESTIONS}

    @classmethod
    def from_document(cls, document: dict[str, Any], name: str) -> Study:
        """The study of a `key.json`.

        Raises:
            UserError: it is none.
        """
        try:
            pairs = [Pair(**pair | {"input_size": tuple(pair["input_size"])}) for pair in document["pairs"]]
            fields = ("identity", "seed", "trials_per_rater", "frame_rate")
            return cls(**{field: document[field] for field in fields}, pairs=tuple(pairs))
        except (KeyError, TypeError):
            raise UserError(f"{name} is no key of a study; make it with python -m preference.study make") from None
