"""Heads on the token grid, over the features of the right models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trainer import toys
from trainer.stages.dual_stream.auxiliary_networks import Critic, Head, token_grid
from trainer.stages.dual_stream.config import HeadConfig


def _inputs(keys: list[str]) -> tuple[torch.Tensor, ...]:
    batch = toys.batch(keys)
    return batch.tensors["z_hr"], torch.full((len(keys),), 0.5), batch.tensors["z_lr"], toys.embed(keys)


def test_a_head_sees_neighbours_in_space_on_the_token_grid() -> None:
    """A token's feature moves exactly the logits that the kernel reaches: tokens lie where they belong."""
    torch.manual_seed(0)
    head = Head(6, HeadConfig(hidden_channels=4, kernel_size=(1, 3, 3), layers=1))
    features = torch.randn(1, 6, 2, 5, 7)
    changed = features.clone()
    changed[0, :, 1, 2, 3] += 1
    moved = (head(changed) - head(features)).abs()[0, 0] > 0
    expected = torch.zeros(2, 5, 7, dtype=torch.bool)
    expected[1, 1:4, 2:5] = True
    assert torch.equal(moved, expected)


def test_token_grid() -> None:
    assert token_grid(torch.Size((2, 16, 6, 90, 160)), (1, 2, 2)) == (6, 45, 80)


@pytest.mark.parametrize(("tapped", "width"), [("both", 96), ("real", 48), ("fake", 48)])
def test_heads_take_the_features_of_the_tapped_models(tapped: Any, width: int) -> None:
    critic = Critic(toys.transformer(0, 2), taps=(1, 2), tapped=tapped, head=HeadConfig(hidden_channels=8))
    assert [head.layers[0].in_channels for head in critic.heads] == [width, width]
    real = tuple(torch.randn(2, 12, 48) for _ in range(2)) if tapped != "fake" else ()
    z_t, *rest = _inputs(["a", "b"])
    out = critic(z_t, *rest, 0.5 * z_t, None, real, real)
    assert out.velocity.shape == z_t.shape
    assert [logits.shape for logits in out.logits_s] == [(2, 1, 2, 2, 3)] * 2
    assert len(out.features_s) == len(out.features_hr) == (0 if tapped == "real" else 2)
    assert not any(feature.requires_grad for feature in out.features_hr)


def test_shared_forward_gives_the_velocity_and_features_of_separate_ones() -> None:
    critic = Critic(toys.transformer(0, 3), taps=(1, 3), tapped="fake", head=HeadConfig(hidden_channels=8))
    z_t, *rest = _inputs(["a", "b"])
    out = critic(z_t, *rest, z_t)
    alone = critic.transformer(z_t, *rest, (1, 3), features_only=True).features
    assert torch.equal(out.velocity, critic.transformer(z_t, *rest).velocity)
    assert all(torch.equal(a, b) for a, b in zip(out.features_s, alone, strict=True))


def test_stop_gradient_keeps_the_heads_loss_from_the_transformer() -> None:
    critic = Critic(toys.transformer(0, 2), taps=(2,), tapped="fake", head=HeadConfig(hidden_channels=8))
    z_t, *rest = _inputs(["a", "b"])
    for stop in (True, False):
        critic.zero_grad()
        critic(z_t, *rest, z_t, stop_gradient=stop).logits_s[0].sum().backward()
        assert critic.heads[0].layers[0].weight.grad is not None
        assert (critic.transformer.patch_embedding.weight.grad is None) == stop


def test_without_taps_there_is_no_discriminator() -> None:
    critic = Critic(toys.transformer(0, 2))
    out = critic(*_inputs(["a"]))
    assert len(critic.heads) == 0 and out.logits_s == out.features_s == ()
