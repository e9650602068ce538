"""The shard-wise EMA is the EMA of the whole."""

from __future__ import annotations

import pytest
import torch

from tests.trainer import toys
from trainer.engine.config import DeepSpeedConfig, OptimizerConfig
from trainer.engine.network import Network
from trainer.engine.process_group import World


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_ema_equals_the_average_of_gathered_weights(world: World, zero_stage: int) -> None:
    engine = DeepSpeedConfig(zero_stage=zero_stage, precision="bf16", persistence_threshold=0)
    optimizer = OptimizerConfig(learning_rate=1e-2)
    network = Network("student", toys.transformer(5, 2), deepspeed=engine, optimizer=optimizer, ema_decay=0.8)
    expected = network.full_state_dict()
    batch = toys.batch(["a", "b"])
    for _ in range(4):
        with network.updating():
            inputs = (batch.tensors["z_hr"], torch.tensor([0.3, 0.7]), batch.tensors["z_lr"], toys.embed(["", ""]))
            network.backward(network(*inputs).velocity.float().square().mean())
            network.step()
        masters = network.full_state_dict()
        expected = {name: torch.lerp(value, masters[name], 1 - 0.8) for name, value in expected.items()}
    found = network.full_state_dict(ema=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], masters[name]) for name in expected)
