"""The linear layer of constant weights: its values, its gradient, and what it holds."""

from __future__ import annotations

import deepspeed
import pytest
import torch
from torch.nn import functional

from tests.trainer import toys
from trainer.engine.config import DeepSpeedConfig
from trainer.engine.frozen_linear import linear
from trainer.engine.network import Network
from trainer.engine.process_group import World

PLAIN = functional.linear


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("learns", [True, False])
def test_values_and_gradients(shape: tuple[int, ...], biased: bool, learns: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=learns)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=learns) if biased else None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None and leaf.requires_grad]
    expected, found = PLAIN(x, weight, bias), linear(x, weight, bias)
    torch.testing.assert_close(found, expected)
    output_gradient = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, output_gradient),
        torch.autograd.grad(expected, leaves, output_gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_only_a_weight_that_learns_keeps_its_input() -> None:
    x = torch.randn(3, 6, requires_grad=True)
    for learns in (True, False):
        weight = torch.randn(4, 6, requires_grad=learns)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            linear(x, weight, None)
        assert any(tensor is weight for tensor in saved)
        assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved) == learns


@pytest.mark.parametrize(("zero_stage", "used"), [(2, False), (3, True)])
def test_networks_at_zero_3_use_it(zero_stage: int, used: bool, world: World) -> None:
    Network("real_score", toys.transformer(1), deepspeed=DeepSpeedConfig(zero_stage=zero_stage, precision="fp32"))
    assert (functional.linear is linear) == used


def test_a_weight_that_is_sharded_again_before_backward(world: World) -> None:
    network = Network(
        "real_score",
        torch.nn.Linear(6, 4),
        deepspeed=DeepSpeedConfig(zero_stage=3, precision="fp32", persistence_threshold=0),
    )
    weight, bias = network.module.weight, network.module.bias
    x = torch.randn(3, 6, requires_grad=True)
    with deepspeed.zero.GatheredParameters([weight, bias]):
        whole = weight.detach().clone()
        y = linear(x, weight, bias)
    assert weight.numel() == 0
    y.sum().backward()
    torch.testing.assert_close(x.grad, whole.sum(0).expand(3, 6))
    assert weight.numel() == 0
