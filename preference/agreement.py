"""Do the judges agree? Kendall's tau between the orders that metrics give the candidates of a clip, and their ties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from scipy.stats import kendalltau

from metrics.registry import find_metric


@dataclass(frozen=True)
class Agreement:
    """Of the pairs of a dataset.

    Attributes:
        tau: two judges -> Kendall's tau-b, mean over clips: 1 the same order, 0 none in common, -1 reversed. NaN where
            no clip has one, since one of the two gives all candidates the same score.
        clips: two judges -> clips that count in `tau`.
        ties: judge -> share of pairs of candidates to which it gives equal scores.
    """

    tau: dict[tuple[str, str], float]
    clips: dict[tuple[str, str], int]
    ties: dict[str, float]


def agreement(records: Sequence[Mapping[str, Any]]) -> Agreement:
    """Agreement of the judges, and of each with the combined score, over the JSON records of pairs."""
    judges = list(records[0]["scores"])
    rows = [_aligned(record) for record in records]
    tau, clips = {}, {}
    for pair in combinations([*judges, "combined"], 2):
        values = [float(kendalltau(row[pair[0]], row[pair[1]]).statistic) for row in rows]
        found = [value for value in values if not math.isnan(value)]
        tau[pair], clips[pair] = (math.fsum(found) / len(found) if found else math.nan), len(found)
    ties = {judge: [a == b for row in rows for a, b in combinations(row[judge], 2)] for judge in judges}
    return Agreement(tau, clips, {judge: sum(equal) / len(equal) for judge, equal in ties.items()})


def _aligned(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """Scores with higher as better."""
    signs = {name: -1 if find_metric(name).lower_is_better else 1 for name in record["scores"]}
    aligned = {name: [signs[name] * value for value in values] for name, values in record["scores"].items()}
    return aligned | {"combined": list(record["combined"])}
