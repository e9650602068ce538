"""Which of a clip's candidates is best and which is worst, as pure functions of their scores.

Scores of different metrics have different scales, so each metric is stretched to [0, 1] over the candidates
of the clip with 1 the best; full-reference metrics (how faithful) and no-reference metrics (how good) count
one half each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metrics.frame_metric import Metric

#: ranking metrics by name: direction and need of a reference stand in their classes
RankingMetrics = Mapping[str, type[Metric]]


@dataclass(frozen=True)
class Ranking:
    """The outcome for one clip.

    Attributes:
        combined: one value in [0, 1] per candidate, 1 the best.
        best, worst: indices of candidates, the earlier one where values are equal.
        gap: combined[best] - combined[worst].
    """

    combined: tuple[float, ...]
    best: int
    worst: int
    gap: float


def stretch(scores: Sequence[float], lower_is_better: bool) -> tuple[float, ...]:
    """Scores of one metric over the candidates, min-max scaled to [0, 1] with 1 the best.

    Equal scores say nothing: all become 0.5.
    """
    low, high = min(scores), max(scores)
    if low == high:
        return tuple(0.5 for _ in scores)
    scaled = ((score - low) / (high - low) for score in scores)
    return tuple(1 - value if lower_is_better else value for value in scaled)


def combine(scores: Mapping[str, Sequence[float]], metrics: RankingMetrics) -> tuple[float, ...]:
    """½·mean(full-reference) + ½·mean(no-reference) of the stretched scores; one kind alone counts fully.

    Args:
        scores: by metric, one score per candidate.

    Raises:
        ValueError: no metric, lists of different lengths, fewer than two candidates, a score that is not
        finite.
    """
    _check(scores)
    kinds: dict[bool, list[tuple[float, ...]]] = {}
    for name, values in scores.items():
        metric = metrics[name]
        kinds.setdefault(metric.needs_reference, []).append(stretch(values, metric.lower_is_better))
    means = [_mean_columns(rows) for rows in kinds.values()]
    return _mean_columns(means)


def rank(scores: Mapping[str, Sequence[float]], metrics: RankingMetrics) -> Ranking:
    """Combine the scores and pick the pair; see `combine` for arguments and errors."""
    combined = combine(scores, metrics)
    order = range(len(combined))
    best = max(order, key=lambda index: (combined[index], -index))
    worst = min(order, key=lambda index: (combined[index], index))
    return Ranking(combined, best, worst, combined[best] - combined[worst])


def is_pair(ranking: Ranking, minimum_gap: float) -> bool:
    """Whether best and worst differ, and by at least `minimum_gap`."""
    return ranking.best != ranking.worst and ranking.gap > 0 and ranking.gap >= minimum_gap


def differences(ranking: Ranking, scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """By metric, how far the raw scores of best and worst are apart."""
    return {name: abs(values[ranking.best] - values[ranking.worst]) for name, values in scores.items()}


def _check(scores: Mapping[str, Sequence[float]]) -> None:
    lengths = {len(values) for values in scores.values()}
    if len(lengths) != 1 or lengths.pop() < 2:
        raise ValueError("ranking needs at least one metric, and as many scores (two or more) from each")
    for name, values in scores.items():
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} gave a score that is not finite: {list(values)}")


def _mean_columns(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))
