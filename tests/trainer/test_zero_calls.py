"""The table of calls: how a network may run beside the one being updated, and what every other way does.

Each row was found by trial; a new DeepSpeed that changes one of them shows up here. Rows marked wrong are
what `trainer.engine.network.Network` forbids.
"""

from __future__ import annotations

import pytest

from tests.trainer import scenarios, toys
from tests.trainer.ranks import run_on_ranks
from trainer.engine.config import DeepSpeedConfig, OptimizerConfig
from trainer.engine.network import Network
from trainer.engine.process_group import World

EXACT = 1e-5
#: zero_stage, network, call, requires_grad, outcome: "exact", "wrong" without an error, or the error's name
TABLE = [
    (3, "real_score", "engine", False, "RuntimeError"),
    (3, "real_score", "engine.module", False, "exact"),
    (3, "critic", "engine", True, "wrong"),
    (3, "critic", "engine.module", True, "AssertionError"),
    (3, "critic", "engine", False, "wrong"),
    (3, "critic", "engine.module", False, "exact"),
    (2, "critic", "engine", True, "exact"),
    (2, "critic", "engine.module", True, "AssertionError"),
    (2, "critic", "engine", False, "IndexError"),
    (2, "critic", "engine.module", False, "exact"),
    (1, "critic", "engine", True, "exact"),
    (1, "critic", "engine.module", True, "wrong"),
    (1, "critic", "engine", False, "IndexError"),
    (1, "critic", "engine.module", False, "exact"),
]


def _check(row: tuple[int, str, str, bool, str], result: dict) -> None:
    outcome = row[-1]
    worst = max((max(errors) for errors in result["errors"]), default=0.0)
    if outcome in ("exact", "wrong"):
        assert result["error"] == "" and (worst <= EXACT) == (outcome == "exact"), (row, result)
    else:
        assert result["error"] == outcome, (row, result)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "-".join(map(str, row)))
def test_table_on_one_rank(world: World, row: tuple[int, str, str, bool, str]) -> None:
    zero_stage, network, call, requires_grad, _ = row
    _check(
        row,
        scenarios.student_passes(world, zero_stage=zero_stage, network=network, call=call, requires_grad=requires_grad),
    )


@pytest.mark.distributed
def test_table_on_two_ranks() -> None:
    rows = [row[:-1] for row in TABLE]
    for results in run_on_ranks("tests.trainer.scenarios:table_of_calls", ranks=2, rows=rows):
        for row, result in zip(TABLE, results["rows"], strict=True):
            _check(row, result)


def test_network_refuses_the_wrong_calls(world: World) -> None:
    engine = DeepSpeedConfig(zero_stage=1, precision="fp32")
    network = Network("critic", toys.transformer(0, 1), deepspeed=engine, optimizer=OptimizerConfig(learning_rate=1.0))
    with pytest.raises(RuntimeError, match="not being updated"):
        network()
    with network.updating(), pytest.raises(RuntimeError, match="being updated"):
        network.frozen()
    real_score = Network("real_score", toys.transformer(0, 1), deepspeed=engine)
    with pytest.raises(RuntimeError, match="no optimizer"), real_score.updating():
        pass
