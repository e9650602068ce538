"""Ranking by its properties, over many random sets of scores."""

from __future__ import annotations

import math
import random

import pytest

from metrics.frame_metric import Metric
from metrics.registry import METRICS
from preference.ranking import combine, is_pair, rank, stretch

RANKED: dict[str, type[Metric]] = {"lpips": METRICS["lpips"], "musiq": METRICS["musiq"], "dover": METRICS["dover"]}
RANGES = {"lpips": (0.0, 1.0), "musiq": (20.0, 80.0), "dover": (0.0, 100.0)}


def draw(seed: int, candidates: int = 5) -> dict[str, list[float]]:
    generator = random.Random(seed)
    return {name: [generator.uniform(*RANGES[name]) for _ in range(candidates)] for name in RANKED}


@pytest.mark.parametrize("seed", range(30))
def test_combined_is_the_written_formula(seed: int) -> None:
    scores = draw(seed)
    expected = []
    for index in range(5):
        part = {name: (v[index] - min(v)) / (max(v) - min(v)) for name, v in scores.items()}
        expected.append(0.5 * (1 - part["lpips"]) + 0.5 * (part["musiq"] + part["dover"]) / 2)
    assert combine(scores, RANKED) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_scale_and_offset_of_a_metric_do_not_matter(seed: int) -> None:
    scores = draw(seed)
    moved = scores | {"musiq": [0.01 * value - 7 for value in scores["musiq"]]}
    assert combine(moved, RANKED) == pytest.approx(combine(scores, RANKED), abs=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_flipped_direction_equals_negated_scores(seed: int) -> None:
    scores = draw(seed)
    negated = scores | {"lpips": [-value for value in scores["lpips"]]}
    upwards = type("Upwards", (METRICS["lpips"],), {"lower_is_better": False})
    flipped = RANKED | {"lpips": upwards}
    assert combine(negated, flipped) == pytest.approx(combine(scores, RANKED), abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_reordered_candidates_keep_their_values(seed: int) -> None:
    scores, order = draw(seed), list(range(5))
    random.Random(seed).shuffle(order)
    shuffled = {name: [values[index] for index in order] for name, values in scores.items()}
    before, after = rank(scores, RANKED), rank(shuffled, RANKED)
    assert after.combined == tuple(before.combined[index] for index in order)
    assert order[after.best] == before.best
    assert order[after.worst] == before.worst


@pytest.mark.parametrize("seed", range(30))
def test_a_candidate_better_everywhere_wins_and_one_worse_everywhere_loses(seed: int) -> None:
    scores = draw(seed)
    for name, metric in RANKED.items():
        worst, best = (max, min) if metric.lower_is_better else (min, max)
        step = 1 if metric.lower_is_better else -1
        scores[name][3] = worst(scores[name]) + step
        scores[name][1] = best(scores[name]) - step
    ranking = rank(scores, RANKED)
    assert (ranking.best, ranking.worst, ranking.gap) == (1, 3, 1.0)


def test_equal_scores_are_no_pair() -> None:
    ranking = rank({name: [1.0] * 5 for name in RANKED}, RANKED)
    assert ranking.combined == (0.5,) * 5
    assert not is_pair(ranking, 0.0)


def test_one_silent_metric_leaves_the_order_to_the_others() -> None:
    scores = {"lpips": [0.3, 0.3, 0.3], "musiq": [50.0, 70.0, 60.0]}
    ranking = rank(scores, RANKED)
    assert (ranking.best, ranking.worst, ranking.gap) == (1, 0, 0.5)


def test_one_kind_alone_counts_whole() -> None:
    assert combine({"musiq": [1.0, 3.0, 2.0]}, RANKED) == (0.0, 1.0, 0.5)
    assert stretch([4.0, 2.0], lower_is_better=True) == (0.0, 1.0)


def test_minimum_gap_drops_close_candidates() -> None:
    ranking = rank({"lpips": [0.1, 0.2], "musiq": [40.0, 41.0]}, RANKED)  # each prefers another one
    assert ranking.gap == 0
    assert not is_pair(ranking, 0.0)
    clear = rank({"musiq": [40.0, 41.0]}, RANKED)
    assert is_pair(clear, 1.0)
    close = rank({"lpips": [0.1, 0.2, 0.15], "musiq": [40.0, 41.0, 41.5]}, RANKED)
    assert 0 < close.gap < 1
    assert is_pair(close, close.gap)
    assert not is_pair(close, math.nextafter(close.gap, 1))


@pytest.mark.parametrize(
    "scores", [{}, {"musiq": [1.0]}, {"musiq": [1.0, 2.0], "lpips": [0.1]}, {"musiq": [1.0, math.nan]}]
)
def test_scores_that_cannot_be_ranked_are_refused(scores: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match=r"ranking needs|not finite"):
        rank(scores, RANKED)
