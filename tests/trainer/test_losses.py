"""Every loss against a float64 computation written without the trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.stages import losses

SHAPE = (3, 4, 2, 4, 6)


def _random(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def _maps(seed: int) -> list[np.ndarray]:
    return [1.5 * _random(seed + index, (3, 1, 2, 2, 3)) for index in range(3)]


def test_velocity_loss_is_a_mean() -> None:
    v, target = _random(0), _random(1)
    assert losses.velocity_loss(_tensor(v), _tensor(target)).item() == pytest.approx(((v - target) ** 2).mean(), 1e-6)


def test_losses_of_bf16_outputs_are_computed_in_float32() -> None:
    v = _tensor(_random(0)).bfloat16()
    expected = (v.double() ** 2).mean().item()
    assert losses.velocity_loss(v, torch.zeros(SHAPE)).item() == pytest.approx(expected, rel=1e-6)


def test_discriminator_loss() -> None:
    hr, s = _maps(0), _maps(10)
    expected = {
        "hinge": [np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean() for r, f in zip(hr, s, strict=True)],
        "softplus": [np.log1p(np.exp(-r)).mean() + np.log1p(np.exp(f)).mean() for r, f in zip(hr, s, strict=True)],
        "relativistic": [np.log1p(np.exp(-(r - f))).mean() for r, f in zip(hr, s, strict=True)],
    }
    for kind, values in expected.items():
        found = losses.discriminator_loss([*map(_tensor, hr)], [*map(_tensor, s)], kind)
        assert found.item() == pytest.approx(np.mean(values), rel=1e-6), kind


def test_generator_loss() -> None:
    hr, s = _maps(0), _maps(10)
    expected = {
        "hinge": -np.mean([f.mean() for f in s]),
        "softplus": np.mean([np.log1p(np.exp(-f)).mean() for f in s]),
        "relativistic": np.mean([np.log1p(np.exp(-(f - r))).mean() for r, f in zip(hr, s, strict=True)]),
    }
    for kind, value in expected.items():
        found = losses.generator_loss([*map(_tensor, s)], [*map(_tensor, hr)], kind)
        assert found.item() == pytest.approx(value, rel=1e-6), kind


@pytest.mark.parametrize("normalised", [True, False])
def test_feature_matching_is_the_mean_over_the_concatenation_and_spares_hr(normalised: bool) -> None:
    raw_s, raw_hr = ([3 * _random(index + first, (3, 12, 48)) for index in range(6)] for first in (0, 10))
    s, hr = ([_tensor(array).requires_grad_() for array in raw] for raw in (raw_s, raw_hr))
    loss = losses.feature_matching_loss(s, hr, normalised=normalised)

    def norm(h: np.ndarray) -> np.ndarray:
        centred = h - h.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) if normalised else h

    difference = np.concatenate([norm(a) - norm(b) for a, b in zip(raw_s, raw_hr, strict=True)], -1)
    assert loss.item() == pytest.approx((difference**2).mean(), rel=1e-5)
    loss.backward()
    assert s[0].grad is not None and hr[0].grad is None


def test_perturbation_penalty_and_its_gradient() -> None:
    plain, perturbed = _maps(0), _maps(10)
    leaves = [torch.tensor(array, requires_grad=True) for array in plain]
    penalty = losses.perturbation_penalty(leaves, [torch.tensor(array) for array in perturbed])
    assert penalty.item() == pytest.approx(
        np.mean([((a - b) ** 2).mean() for a, b in zip(plain, perturbed, strict=True)])
    )
    penalty.backward()
    gradient = 2 * (plain[1] - perturbed[1]) / plain[1].size / 3
    np.testing.assert_allclose(leaves[1].grad.numpy(), gradient, rtol=1e-9)


def test_guidance_and_data_forcing_gradients() -> None:
    z0, conditional, null, z_hr = (_random(index) for index in range(4))
    found = losses.guidance_gradient(*(torch.tensor(z) for z in (z0, conditional, null)), 3.0)
    scale = np.abs(z0 - conditional).mean((1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(found.numpy(), 3 * (null - conditional) / scale, rtol=1e-9)
    normaliser = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    forcing = losses.data_forcing_gradient(torch.tensor(z_hr), torch.tensor(z0), normaliser).numpy()
    np.testing.assert_allclose(forcing[:2], (z0 - z_hr)[:2] / np.array([0.5, 2.0]).reshape(2, 1, 1, 1, 1), rtol=1e-9)
    assert not forcing[2].any(), "a sample without a normaliser is left out"


def test_dmd_gradient_and_loss() -> None:
    z0, real, fake = _random(0), _random(1), _random(2)
    expected = np.stack([(f - r) / np.abs(z - r).mean() for z, r, f in zip(z0, real, fake, strict=True)])
    leaf = _tensor(z0).requires_grad_()
    gradient, normaliser = losses.dmd_gradient(leaf, _tensor(real), _tensor(fake))
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normaliser.numpy(), np.abs(z0 - real).mean((1, 2, 3, 4)), rtol=1e-6)
    loss = losses.dmd_loss(leaf, gradient)
    assert loss.item() == pytest.approx(0.5 * (expected**2).mean(), rel=1e-5)
    loss.backward()
    # z - (z - Grad) in float32 loses the digits that z has and Grad has not.
    np.testing.assert_allclose(leaf.grad.numpy(), expected / expected.size, rtol=1e-4, atol=1e-9)


def test_dmd_normaliser_is_per_sample() -> None:
    """Another sample in the batch, however far off, changes nothing."""
    z0, real, fake = (_tensor(_random(seed)) for seed in range(3))
    together, _ = losses.dmd_gradient(z0, real, fake)
    real[1] += 1000
    with_outlier, _ = losses.dmd_gradient(z0, real, fake)
    assert torch.equal(together[[0, 2]], with_outlier[[0, 2]])
    assert not torch.equal(together[1], with_outlier[1])


def test_dmd_gradient_is_zero_where_it_is_not_finite() -> None:
    z0, real, fake = (_tensor(_random(seed)) for seed in range(3))
    real[0] = z0[0]  # normaliser 0
    fake[1, 0, 0, 0, 0] = float("nan")
    fake[2, 0, 0, 0, 0] = float("inf")
    gradient, _ = losses.dmd_gradient(z0, real, fake)
    assert torch.isfinite(gradient).all()
    assert (gradient[0] == 0).all() and gradient[1, 0, 0, 0, 0] == 0 and gradient[2, 0, 0, 0, 0] == 0
    assert (gradient[1:].flatten(1)[:, 1:] != 0).all()
