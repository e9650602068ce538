"""One rank or two, ZeRO 1, 2 or 3, accumulation, checkpointing: all are the plain PyTorch loop."""

from __future__ import annotations

import pytest

from tests.trainer import parity
from trainer.engine.process_group import World


@pytest.mark.distributed
def test_every_way_of_sharding_is_the_plain_loop(world: World) -> None:
    rounds = parity.FEW_ROUNDS
    yardstick = parity.plain_logs(rounds)
    for row, logs in parity.run(world, parity.TESTED, rounds).items():
        assert len(logs) == rounds
        for names, in_float32, in_bf16 in (
            (parity.LOSSES, 1e-4, 0.2),
            (parity.NORMS, 1e-5, 0.03),
            (parity.PARTS, 1e-4, 0.03),
        ):
            allowed = in_float32 if row.precision == "fp32" else in_bf16
            assert parity.deviation(logs, yardstick, names, rounds) <= allowed, (row, names)
