"""The prediction of z_HR: least squares against NumPy, blocks beyond the filter, and what the command leaves."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from datagen.dataset.loader import ShardReader
from pipeline.model.load_weights import load_transformer, saved_config
from pipeline.model.low_resolution_skip import LowResolutionPredictor
from pipeline.model.tiny_vae import TinyVideoVAE
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import load_vae
from tests.trainer.presets import write_preset
from tools.fit_low_resolution_predictor import DEVIATION_SAMPLES, PixelLoss, fit, main, take_over, train


def test_least_squares_agree_with_numpy_and_with_the_residual():
    generator = torch.Generator().manual_seed(0)
    z_lr = torch.randn(6, 3, 2, 5, 4, generator=generator)
    truth = LowResolutionPredictor(3, 0.5)
    with torch.no_grad():
        truth.filter.weight.normal_(std=0.3, generator=generator)
        truth.filter.bias.normal_(generator=generator)
        noise = torch.tensor([0.1, 0.4, 1.0]).view(1, 3, 1, 1, 1) * torch.randn(z_lr.shape, generator=generator)
        z_hr = truth(z_lr)[0] + noise
    found = LowResolutionPredictor(3, 0.5)
    left = fit(found, [(z_lr[:2], z_hr[:2]), (z_lr[2:], z_hr[2:])])

    padded = np.pad(z_lr.numpy().astype(np.float64), ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    rows = [
        [*padded[b, :, t, y : y + 3, x : x + 3].reshape(-1), 1.0]
        for b in range(6) for t in range(2) for y in range(5) for x in range(4)
    ]  # fmt: skip
    target = (z_hr - z_lr).permute(0, 2, 3, 4, 1).reshape(-1, 3).numpy().astype(np.float64)
    solution, _, _, _ = np.linalg.lstsq(np.array(rows), target, rcond=None)
    residual = target - np.array(rows) @ solution
    expected = solution[:-1].T.reshape(3, 3, 3, 3)
    assert np.abs(found.filter.weight.detach().numpy() - expected).max() < 2e-3  # the ridge
    deviations = found.log_deviation.detach().exp().numpy()
    assert np.allclose(deviations, np.sqrt((residual**2).mean(0)), rtol=1e-3)
    assert left == pytest.approx((residual**2).sum() / (target**2).sum(), rel=1e-3)


def test_blocks_learn_what_no_filter_can():
    """z_HR - z_LR = |z_LR|: least squares leave most of it, the blocks nearly none, and σ says how much."""
    generator = torch.Generator().manual_seed(0)

    def pairs():
        while True:
            z_lr = torch.randn(8, 2, 1, 4, 4, generator=generator)
            yield z_lr, z_lr + z_lr.abs()

    torch.manual_seed(0)
    predictor = LowResolutionPredictor(2, 0.5, blocks=1, width=16)
    z_lr, z_hr = next(pairs())
    assert torch.equal(predictor(z_lr)[0], z_lr)  # no training: z_LR
    left_by_filter = fit(predictor, [next(pairs()) for _ in range(DEVIATION_SAMPLES // 8)])
    left = train(predictor, pairs(), 300, 1e-2)
    assert left_by_filter > 0.3 and left < 0.03
    predicted, sigma = predictor(z_lr)
    error = (predicted - z_hr).detach().square().mean((0, 2, 3, 4)).sqrt()
    assert torch.allclose(sigma.detach().flatten(), error, rtol=0.3)


def test_the_pixel_loss_agrees_with_float64_and_has_its_gradient(tmp_path):
    torch.manual_seed(0)
    vae = TinyVideoVAE(z_dim=4, hidden_dim=8, num_blocks=1, latents_mean=[0.1] * 4, latents_std=[0.5] * 4).double()
    z = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    hr = torch.randint(0, 256, (2, 5, 32, 32, 3), dtype=torch.uint8)
    loss = PixelLoss(vae, 3.0, 0.2)(z, hr)

    def plain(z):
        error = vae.decode(z * 0.5 + 0.1).sample - (hr.double() / 127.5 - 1).permute(0, 4, 1, 2, 3)
        rows = error[..., ::2, :] + error[..., 1::2, :]
        half = (rows[..., ::2] + rows[..., 1::2]) / 4
        sizes = [(size[..., 1:, :] - size[..., :-1, :]).abs().mean() for size in (error, half)]
        sizes += [(size[..., 1:] - size[..., :-1]).abs().mean() for size in (error, half)]
        return 3 * (error.square().mean() + 0.2 * sum(sizes) / 4)

    assert loss.item() == pytest.approx(plain(z).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, z)
    (expected,) = torch.autograd.grad(plain(z), z)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-8)


def test_the_pixel_loss_compares_the_window_that_it_decodes():
    """What lies outside changes nothing; what lies inside has the loss of the whole where the rest is right."""
    vae = TinyVideoVAE(z_dim=4, hidden_dim=8, num_blocks=1)
    z = torch.randn(1, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    hr = torch.randint(0, 256, (1, 1, 128, 128, 3), dtype=torch.uint8)
    loss = PixelLoss(vae, 1.0)
    inside, outside, elsewhere = hr.clone(), hr.clone(), z.clone()
    inside[:, :, 40:41] ^= 64  # row 40 px lies in place 5
    outside[:, :, 31:32] ^= 64  # place 3 is the window's border
    elsewhere[..., :3, :] += 1
    before = loss(z, hr, (3, 2))
    assert torch.equal(loss(z, outside, (3, 2)), before) and torch.equal(loss(elsewhere, hr, (3, 2)), before)
    assert not torch.equal(loss(z, inside, (3, 2)), before)


def test_with_a_pixel_loss_the_prediction_decodes_better(tmp_path, monkeypatch):
    """The same steps from the same start, on clips that are not what the VAE encodes: the pixels get nearer."""
    preset = write_preset(tmp_path)
    line = ["fit", "--config", str(preset), "--data", str(tmp_path / "clips"), "--samples", "8", "--steps", "60"]
    line += ["--set", "model.transformer.low_resolution_skip=true", "--set", "model.transformer.predictor_blocks=1"]
    line += ["--set", "model.transformer.low_resolution_predictor=true", "--learning-rate", "1e-2"]
    line += ["--set", "model.transformer.low_resolution_deviation=0.5"]
    batch = next(iter(ShardReader(tmp_path / "clips", members=("latents", "hr"), seed=0, global_batch_size=8)))
    errors = {}
    for weight in ("0", "100"):
        output = tmp_path / weight
        monkeypatch.setattr(sys, "argv", [*line, "--pixel-weight", weight, "--output", str(output)])
        main()
        predictor = load_transformer(output, saved_config(output)).float().predictor
        with torch.no_grad():
            predicted = predictor(batch.tensors["z_lr"].float())[0]
            errors[weight] = PixelLoss(load_vae(tmp_path / "vae"), 1.0)(predicted, batch.tensors["hr"]).item()
    assert errors["100"] < 0.995 * errors["0"]


def test_the_command_leaves_initial_weights_that_begin_at_the_prediction(tmp_path, monkeypatch):
    preset = write_preset(tmp_path)
    line = ["fit", "--config", str(preset), "--data", str(tmp_path / "clips"), "--samples", "8"]
    line += ["--set", "model.transformer.low_resolution_skip=true"]
    line += ["--set", "model.transformer.low_resolution_deviation=0.5"]
    predictor = ["--set", "model.transformer.low_resolution_predictor=true", "--steps", "2"]
    predictor += ["--set", "model.transformer.predictor_blocks=1", "--set", "model.transformer.residual_input=true"]
    monkeypatch.setattr(sys, "argv", [*line, "--output", str(tmp_path / "none")])
    with pytest.raises(UserError, match="low_resolution_predictor is false"):
        main()
    monkeypatch.setattr(sys, "argv", [*line, *predictor, "--output", str(tmp_path / "first")])
    main()
    again = [*line, *predictor, "--output", str(tmp_path / "second"), "--model", str(tmp_path / "first"), "--seed", "1"]
    monkeypatch.setattr(sys, "argv", again)
    main()
    model = load_transformer(tmp_path / "second", saved_config(tmp_path / "second"))
    assert not model.proj_out.weight.any() and model.predictor.filter.weight.any()
    assert model.predictor.leave.weight.any()
    first = load_file(tmp_path / "first" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(model.blocks[0].ffn.net[2].weight, first["blocks.0.ffn.net.2.weight"])


def test_a_predictor_of_the_same_blocks_is_taken_over(tmp_path):
    shape = {
        "latent_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16,
        "text_dim": 8, "num_layers": 1, "low_resolution_skip": True, "low_resolution_deviation": 0.5,
        "low_resolution_predictor": True, "predictor_blocks": 1, "predictor_width": 8, "residual_input": True,
    }  # fmt: skip
    torch.manual_seed(0)
    trained = VSRTransformer(**shape)
    trained.save_pretrained(tmp_path)
    for change, expected in (({}, True), ({"predictor_blocks": 2}, False), ({"residual_input": False}, False)):
        model = VSRTransformer(**{**shape, **change})
        assert take_over(model, tmp_path) is expected
        assert torch.equal(model.proj_out.weight, trained.proj_out.weight) is expected
        assert torch.equal(model.predictor.enter.weight, trained.predictor.enter.weight) is expected
        assert torch.equal(model.blocks[0].ffn.net[2].weight, trained.blocks[0].ffn.net[2].weight)


def test_blocks_of_another_shape_are_refused(tmp_path):
    shape = {
        "latent_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16,
        "text_dim": 8, "low_resolution_skip": True, "low_resolution_deviation": 0.5,
    }  # fmt: skip
    VSRTransformer(**shape, num_layers=2).save_pretrained(tmp_path)
    for change, fault in (({"num_layers": 3}, "blocks.2.* is missing"), ({"num_layers": 1}, "blocks.1.* is unknown")):
        model = VSRTransformer(**{**shape, **change, "low_resolution_predictor": True})
        with pytest.raises(UserError, match=fault):
            take_over(model, tmp_path)
