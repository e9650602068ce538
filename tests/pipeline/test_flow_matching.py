"""Flow matching against independent float64 arithmetic."""

import numpy as np
import pytest
import torch

from pipeline.flow_matching import q_t, shift_time, time_grid, velocity, x0_from_velocity
from pipeline.sampling import euler_sample, guided_velocity, one_step

SHAPE = (3, 4, 2, 5, 6)


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def test_path_velocity_and_clean_latent_agree_with_float64(latents):
    z0, noise = latents
    t = torch.tensor([0.0, 0.3, 1.0])
    column = t.numpy().astype(np.float64).reshape(-1, 1, 1, 1, 1)
    expected = (1 - column) * z0.double().numpy() + column * noise.double().numpy()
    z_t = q_t(z0, noise, t)
    np.testing.assert_allclose(z_t.numpy(), expected, atol=1e-6)
    v = velocity(z0, noise)
    np.testing.assert_allclose(v.numpy(), noise.double().numpy() - z0.double().numpy(), atol=1e-6)
    np.testing.assert_allclose(x0_from_velocity(z_t, v, t).numpy(), z0.numpy(), atol=1e-5)


def test_clean_latent_is_computed_in_float32_from_bfloat16(latents):
    z0, noise = (x.bfloat16() for x in latents)
    t = torch.full((3,), 0.9)
    recovered = x0_from_velocity(q_t(z0, noise, t), velocity(z0, noise), t)
    assert recovered.dtype == torch.float32
    assert (recovered - z0.float()).abs().max() < 1e-5


def test_shift_is_the_published_formula_and_keeps_the_ends():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(shift_time(t, 5.0), 5 * t / (1 + 4 * t))
    grid = time_grid(50, 5.0)
    assert grid.shape == (51,) and grid[0] == 1 and grid[-1] == 0 and (grid[:-1] > grid[1:]).all()


def test_euler_is_exact_on_a_straight_path(latents):
    z0, noise = latents

    def straight(z_t, t, z_lr, prompt):
        return velocity(z0, noise)

    for steps in (1, 7):
        result = euler_sample(straight, noise, z0, torch.zeros(3, 1, 1), steps=steps, shift=5.0)
        assert torch.allclose(result, z0, atol=1e-5)


def test_euler_converges_on_a_curved_path(latents):
    """dz/dt = z from t = 1 to 0 shrinks z by e; the error of Euler's method falls with the step."""
    _, noise = latents
    errors = []
    for steps in (20, 200):
        result = euler_sample(lambda z, *_: z, noise, noise, torch.zeros(3, 1, 1), steps=steps, shift=1.0)
        errors.append((result - noise / np.e).abs().max().item())
    assert errors[1] < errors[0] / 8


def test_guidance_weight_is_that_of_the_method(latents):
    z0, noise = latents
    prompt, null = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)

    def model(z_t, t, z_lr, c):
        return z_t * (1 + c.mean())

    guided = guided_velocity(model, noise, torch.ones(3), z0, prompt, null, 3.0)
    conditional, unconditional = noise.double() * 2, noise.double()
    assert torch.allclose(guided.double(), (1 + 3.0) * conditional - 3.0 * unconditional, atol=1e-5)


def test_one_step_asks_the_model_at_t_1(latents):
    _, noise = latents
    seen = []

    def model(z_t, t, z_lr, prompt):
        seen.append(t)
        return 0.25 * z_t

    result = one_step(model, noise, noise, torch.zeros(3, 1, 1))
    assert torch.equal(seen[0], torch.ones(3)) and torch.allclose(result, 0.75 * noise)
