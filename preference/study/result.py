"""Answers counted: good, same, bad (GSB) from the reference's side, intervals over raters, agreement between raters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from metrics.bootstrap import HIGH, LOW, RESAMPLES
from preference.study.store import AnswerSheet
from preference.study.trials import QUESTIONS

#: clip -> rater -> +1, 0 or -1
Votes = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Count:
    """The answers to one question on two methods.

    Attributes:
        good, same, bad: answers for the reference, for neither, for the other.
        raters: that answered.
        score: (good - bad)/(good + same + bad) in [-1, 1].
        low, high: its 95 % percentile bootstrap interval over raters; None with fewer than two.
        equal: share of equal answers of two raters to one clip; None where no clip has two answers.
        alpha: Krippendorff's alpha, interval scale: 1 agreement, 0 chance; None where it is not defined.
    """

    reference: str
    other: str
    question: str
    good: int
    same: int
    bad: int
    raters: int
    score: float
    low: float | None
    high: float | None
    equal: float | None
    alpha: float | None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def count(sheets: Sequence[AnswerSheet]) -> list[Count]:
    """One row for each two methods and question that has answers."""
    votes: dict[tuple[str, str, str], Votes] = defaultdict(lambda: defaultdict(dict))
    for sheet in sheets:
        for reference, other, clip, question, value in sheet.counted():
            votes[reference, other, question][clip][sheet.rater] = value
    order = list(QUESTIONS)
    rows = sorted(votes.items(), key=lambda item: (item[0][:2], order.index(item[0][2])))
    return [_count(*key, clips) for key, clips in rows]


def _count(reference: str, other: str, question: str, clips: Votes) -> Count:
    values = [value for given in clips.values() for value in given.values()]
    by_rater: dict[str, list[int]] = defaultdict(list)
    for given in clips.values():
        for rater, value in given.items():
            by_rater[rater].append(value)
    low, high = _interval([by_rater[rater] for rater in sorted(by_rater)])
    return Count(
        reference, other, question, values.count(1), values.count(0), values.count(-1), len(by_rater),
        sum(values) / len(values), low, high, equal_answers(clips), krippendorff_alpha(clips),
    )  # fmt: skip


def _interval(raters: list[list[int]]) -> tuple[float | None, float | None]:
    """Raters are drawn with all their answers: one rater's answers are no independent samples."""
    if len(raters) < 2:
        return None, None
    sums, counts = np.array([sum(values) for values in raters]), np.array([len(values) for values in raters])
    drawn = np.random.default_rng(0).integers(0, len(raters), (RESAMPLES, len(raters)))
    scores = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return float(np.quantile(scores, LOW)), float(np.quantile(scores, HIGH))


def equal_answers(clips: Votes) -> float | None:
    """Share of pairs of raters that answered alike, over all clips."""
    pairs = [a == b for given in clips.values() for a, b in combinations(given.values(), 2)]
    return sum(pairs) / len(pairs) if pairs else None


def krippendorff_alpha(clips: Votes) -> float | None:
    """1 - observed/expected disagreement, squared differences (Krippendorff, "Content Analysis", 2004, chapter 11).

    Clips with one answer say nothing. None where no clip has two, or all answers are equal.
    """
    units = [np.array(list(given.values()), dtype=float) for given in clips.values() if len(given) > 1]
    if not units:
        return None
    answers = np.concatenate(units)
    observed = sum(_differences(unit) / (len(unit) - 1) for unit in units) / len(answers)
    expected = _differences(answers) / (len(answers) * (len(answers) - 1))
    return float(1 - observed / expected) if expected else None


def _differences(values: np.ndarray) -> float:
    """Sum of squared differences over ordered pairs."""
    return float(((values[:, None] - values[None]) ** 2).sum())
