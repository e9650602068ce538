"""`--stage codec`: its losses against float64, its crops, and a real run with resume and export."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from common.errors import UserError
from common.seeding import seeded_noise
from datagen.dataset.loader import Batch
from pipeline.model.config import ModelConfig
from pipeline.model.small_vae import SmallVideoVAE
from pipeline.model.vae import load_vae, to_pixels
from trainer.engine.config import DeepSpeedConfig
from trainer.engine.process_group import World
from trainer.stages.codec import SPEC, Codec, CodecConfig, activation_bytes, export_codec, load_codec
from trainer.stages.losses import grid_loss, latent_scale_loss, multiscale_gradient_loss, reconstruction_loss
from trainer.stages.stage import StageSetup

SHAPE = (2, 3, 5, 16, 24)


def random(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE)


def test_reconstruction_and_latent_scale_losses() -> None:
    y, x = random(0), random(1)
    loss = reconstruction_loss(torch.tensor(y), torch.tensor(x), 0.3)
    assert loss.item() == pytest.approx(((y - x) ** 2).mean() + 0.3 * np.abs(y - x).mean(), rel=1e-12)
    assert latent_scale_loss(torch.tensor(y)).item() == pytest.approx(((y**2).mean() - 1) ** 2, rel=1e-12)


def test_multiscale_gradient_loss_and_its_gradient() -> None:
    y, x = random(0), random(1)
    error, terms = y - x, []
    for scale in range(3):
        if scale:
            height, width = error.shape[-2:]
            error = error.reshape(*error.shape[:-2], height // 2, 2, width // 2, 2).mean((-3, -1))
        terms += [np.abs(np.diff(error, axis=-2)).mean(), np.abs(np.diff(error, axis=-1)).mean()]
    leaf = torch.tensor(y, requires_grad=True)
    loss = multiscale_gradient_loss(leaf, torch.tensor(x), 3)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)
    loss.backward()
    step = np.zeros(SHAPE)
    step[1, 2, 3, 7, 9] = 1e-6
    ends = [multiscale_gradient_loss(torch.tensor(y + sign * step), torch.tensor(x), 3).item() for sign in (1, -1)]
    assert leaf.grad is not None
    assert leaf.grad[1, 2, 3, 7, 9].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_grid_loss_and_its_gradient() -> None:
    y, x = random(0), random(1)
    y[..., 8:] += 2  # a border that x has not
    errors = []
    for axis in (-2, -1):
        energies = []
        for clip in (y, x):
            squared = np.moveaxis(np.diff(clip, axis=axis) ** 2, axis, -1)
            energies.append(np.stack([squared[..., p::8].mean((1, 2, 3, 4)) for p in range(8)], 1))
        mine, theirs = (energy - energy.mean(1, keepdims=True) for energy in energies)
        errors.append((mine - theirs) / (energies[1].mean(1, keepdims=True) + (2 / 255) ** 2))
    leaf = torch.tensor(y, requires_grad=True)
    loss = grid_loss(leaf, torch.tensor(x), 8)
    assert loss.item() == pytest.approx(np.mean(np.square(errors)), rel=1e-12)
    loss.backward()
    step = np.zeros(SHAPE)
    step[1, 2, 3, 7, 8] = 1e-6
    ends = [grid_loss(torch.tensor(y + sign * step), torch.tensor(x), 8).item() for sign in (1, -1)]
    assert leaf.grad is not None
    assert leaf.grad[1, 2, 3, 7, 8].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)
    flat = torch.zeros(1, 3, 1, 800, 800, dtype=torch.float64)
    squares = (torch.arange(800) // 8 % 2).double().expand_as(flat)
    noise = torch.tensor(np.random.default_rng(2).normal(size=flat.shape))
    plain, noisy = (grid_loss(clip, squares + noise, 8).item() for clip in (noise, squares + 2 * noise))
    assert noisy < 0.02 * plain, "noise stands for no squares"
    faint = 2 / 255 * squares[..., :64, :64]  # of one grey level, on nothing
    assert grid_loss(faint, torch.zeros_like(faint), 8).item() < 0.1
    assert grid_loss(squares + noise, noise, 8) == pytest.approx(grid_loss(squares, flat + noise, 8).item(), rel=0.1)


def vae(seed: int = 0) -> SmallVideoVAE:
    torch.manual_seed(seed)
    made = SmallVideoVAE(z_dim=6, encoder_dims=(8, 8, 12), decoder_dims=(12, 8, 8, 6), decoder_blocks=(1, 1, 1))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter += 0.05 * seeded_noise(parameter.shape, name)
    return made


def batch(keys: list[str], side: int = 40) -> Batch:
    clips = [(60 * seeded_noise((9, side, side, 3), key) + 128).clamp(0, 255).to(torch.uint8) for key in keys]
    return Batch(keys, {"hr": torch.stack(clips)}, [{} for _ in keys])


def stage(**changes: Any) -> Codec:
    config = CodecConfig(**({"side": 32, "latent_noise": 0.2} | changes))
    engine = DeepSpeedConfig(zero_stage=1, precision="fp32")
    return Codec(
        StageSetup(SPEC, config, {"codec": vae()}, lambda name: engine, lambda captions: torch.zeros(0), seed=5)
    )


def test_a_step_is_the_written_loss(world: World) -> None:
    codec, clips = stage(), batch(["a", "b", "c"])
    plain = copy.deepcopy(codec.codec.module).double()
    x = codec._crop(clips, 3).double()
    draws = codec.draws(3, clips)
    noise = 0.2 * draws.uniform("strength").view(-1, 1, 1, 1, 1) * draws.noise("latent", torch.empty(3, 6, 2, 4, 4))
    decoded, z = plain(x, noise.double())
    error, terms = decoded - x, []
    frames = error.transpose(1, 2).flatten(0, 1)
    for scale in range(3):
        small = F.avg_pool2d(frames, 2**scale) if scale else frames
        terms += [small.diff(dim=-1).abs().mean(), small.diff(dim=-2).abs().mean()]
    expected = error.square().mean() + 0.05 * error.abs().mean() + 0.05 * torch.stack(terms).mean()
    expected = expected + 0.01 * (z.square().mean() - 1) ** 2
    assert codec.train_step(3, [clips])["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_decoder_alone_descends_the_loss_with_squares(world: World, tmp_path: Path) -> None:
    start, clips = vae(), batch(["a", "b", "c"])
    start.save_pretrained(tmp_path / "start")
    codec = stage(train_encoder=False, grid_weight=0.5, gradient_weight=0.0, latent_noise=0.0)
    x = codec._crop(clips, 3).double()
    decoded, z = copy.deepcopy(codec.codec.module).double()(x)
    expected = (decoded - x).square().mean() + 0.05 * (decoded - x).abs().mean() + 0.5 * grid_loss(decoded, x, 8)
    expected = expected + 0.01 * (z.square().mean() - 1) ** 2
    assert codec.train_step(3, [clips])["loss"] == pytest.approx(expected.item(), rel=1e-4)
    state = codec.codec.full_state_dict(ema=True)
    assert {name.split(".")[0] for name in state} == {"decoder", "linear_decode"}
    export_codec(tmp_path / "trained", {"codec": (codec.codec.module, state)}, tmp_path / "start")
    trained = load_vae(tmp_path / "trained")
    frames = x.float()
    assert torch.equal(trained.encode(frames).latent_dist.mode(), start.encode(frames).latent_dist.mode())
    z = start.encode(frames).latent_dist.mode()
    assert not torch.equal(trained.decode(z).sample, start.decode(z).sample)


def test_crops_belong_to_the_sample_and_lie_inside(world: World) -> None:
    codec, both = stage(), batch(["a", "b"])
    crops = codec._crop(both, 0)
    assert crops.shape == (2, 3, 5, 32, 32)
    assert torch.equal(crops[1:], codec._crop(batch(["b"]), 0)), "whatever batch it is in"
    assert not torch.equal(crops, codec._crop(both, 1))
    middle = to_pixels(both.tensors["hr"][0, :5, 4:36, 4:36])
    assert torch.equal(codec.target(both)[0], middle)
    with pytest.raises(UserError, match="lower frames or side"):
        codec._crop(batch(["small"], side=24), 0)


def test_it_learns(world: World) -> None:
    codec, clips = stage(latent_noise=0.0, optimizer={"learning_rate": 3e-3}, linear_learning_rate=3e-3), batch(["a"])
    losses = [codec.train_step(step, [clips])["loss_pixels"] for step in range(15)]
    assert losses[-1] < 0.8 * losses[0]


def test_only_a_small_vae_is_taken_and_given(tmp_path: Path) -> None:
    model = ModelConfig(transformer={"latent_channels": 48}, vae="none", prompts="none")
    assert load_codec(None, model, 0).config.z_dim == 48
    with pytest.raises(UserError, match="TinyVideoVAE"):
        load_codec(Path("assets/tiny/vae"), model, 0)
    made = vae()
    export_codec(tmp_path, {"codec": (made, {name: p.detach() for name, p in made.named_parameters()})})
    assert json.loads((tmp_path / "config.json").read_text())["z_dim"] == 6
    loaded = load_vae(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), made.parameters(), strict=True))


def test_bytes_held_for_the_backward_are_those_of_the_saved_tensors() -> None:
    assert activation_bytes(None, CodecConfig()) == pytest.approx(845 * 5 * 128**2, rel=0.02), "measured on a CPU"  # type: ignore[arg-type]


def test_frames_are_4k_plus_1() -> None:
    with pytest.raises(ValidationError, match=r"4k \+ 1.*5 is"):
        CodecConfig(frames=6)
