"""More channels for a trained small model: its old ones stay, in the VAE, the DiT and the fast decoder."""

import sys

import pytest
import torch

from common.errors import UserError
from common.lossless_clip import encode_bytes
from datagen.dataset.shard_format import Sample, open_folder, write_manifest, write_shard
from pipeline.model.fast_codec import FastDecoder
from pipeline.model.load_weights import load_transformer, saved_config
from pipeline.model.low_resolution_skip import skip_velocity
from pipeline.model.small_vae import SmallVideoVAE
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import decode_latents, encode_video, load_vae, to_frames
from tools import initialise_small_vae, more_channels
from tools.initialise_small_vae import extend, initialise
from tools.more_channels import decoder_with_channels, with_channels

HAVE, CHANNELS = 6, 10


def random_weights(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.data.normal_(std=0.05, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def clips() -> list[torch.Tensor]:
    """Smooth noise, (3, 5, 32, 32) in [-1, 1]."""
    noise = torch.randn(6, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    return list(torch.nn.functional.interpolate(noise, scale_factor=(1, 2, 2), mode="trilinear").clamp(-1, 1))


@pytest.fixture(scope="module")
def trained(clips) -> SmallVideoVAE:
    """Axes of the clips in the linear path, and convolutions that do something."""
    vae = random_weights(
        SmallVideoVAE(z_dim=HAVE, encoder_dims=(4, 4, 4), decoder_dims=(6, 4, 4, 4), decoder_blocks=(1, 1, 1)), 1
    )
    initialise(vae, clips)
    return vae


@pytest.fixture(scope="module")
def extended(trained, clips) -> SmallVideoVAE:
    return extend(trained, clips, CHANNELS).eval()


def test_the_vae_keeps_its_channels_and_loses_less(trained, extended, clips):
    x = torch.stack(clips)
    before, after = encode_video(trained, x), encode_video(extended, x)
    assert after.shape[1] == CHANNELS
    assert torch.allclose(after[:, :HAVE], before, atol=1e-5)
    lost = [(decode_latents(vae, z) - x).square().mean() for vae, z in ((trained, before), (extended, after))]
    assert lost[1] < 0.95 * lost[0]


def test_without_the_new_channels_the_vae_decodes_what_it_did(trained, extended, clips):
    z = extended.encode(clips[0][None]).latent_dist.mode()
    z[:, HAVE:] = 0
    assert torch.allclose(extended.decode(z).sample, trained.decode(z[:, :HAVE]).sample, atol=1e-5)


def test_new_axes_are_orthogonal_to_the_linear_decoder(trained, extended):
    own, new = (weight.flatten(1) for weight in extended.linear_decode.weight.split((HAVE, CHANNELS - HAVE)))
    assert torch.equal(own, trained.linear_decode.weight.flatten(1))
    assert torch.allclose(new @ new.T, torch.eye(CHANNELS - HAVE), atol=1e-5)
    assert (own @ new.T).abs().max() < 1e-4


@pytest.mark.parametrize("residual", [False, True])
def test_the_dit_does_what_it_did_and_takes_the_skip_for_the_rest(residual):
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16, "text_dim": 8}
    skip = {"low_resolution_skip": True, "low_resolution_predictor": True, "low_resolution_deviation": 0.5}
    blocks = {"predictor_blocks": 1, "predictor_width": 8, "residual_input": residual, "patch_size": (1, 2, 2)}
    model = random_weights(VSRTransformer(latent_channels=HAVE, num_layers=2, **shape, **skip, **blocks), 2)
    wider = with_channels(model, CHANNELS).eval()
    generator = torch.Generator().manual_seed(3)
    z_t, z_lr = (torch.randn(2, CHANNELS, 2, 4, 4, generator=generator) for _ in range(2))
    t, prompt = torch.tensor([0.3, 0.8]), torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        old = model(z_t[:, :HAVE], t, z_lr[:, :HAVE], prompt).velocity
        new = wider(z_t, t, z_lr, prompt).velocity
    assert torch.allclose(new[:, :HAVE], old, atol=1e-5)
    deviation = model.predictor.log_deviation.mean().exp().item()
    rest = skip_velocity(z_t[:, HAVE:], t.view(-1, 1, 1, 1, 1), z_lr[:, HAVE:], deviation)
    assert torch.allclose(new[:, HAVE:], rest, atol=1e-5)


def test_the_fast_decoder_does_what_it_did_and_the_vaes_linear_path_for_the_rest(trained, extended):
    scales = {name: trained.config[name] for name in ("latents_mean", "latents_std")}
    decoder = random_weights(FastDecoder(z_dim=HAVE, dims=(6, 4, 4, 4), blocks=(1, 1, 1), **scales), 4)
    wider = decoder_with_channels(decoder, extended).eval()
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(1, CHANNELS, 2, 4, 4, generator=generator)
    low_resolution = torch.rand(1, 3, 5, 8, 8, generator=generator)
    with torch.no_grad():
        raw = z * torch.tensor(extended.config.latents_std).view(1, -1, 1, 1, 1)
        raw += torch.tensor(extended.config.latents_mean).view(1, -1, 1, 1, 1)
        padded = torch.nn.functional.pad(raw[:, HAVE:], (1, 1, 1, 1, 0, 0), mode="replicate")
        weight = extended.linear_decode.weight[HAVE:]
        linear = torch.nn.functional.conv_transpose3d(padded, weight, stride=(4, 8, 8))[:, :, 3:, 12:-12, 12:-12]
        expected = decoder(z[:, :HAVE], low_resolution) + linear
        assert torch.allclose(wider(z, low_resolution), expected, atol=1e-4)


def test_commands(trained, clips, tmp_path, monkeypatch):
    """From a VAE, a DiT and a dataset with stored clips to those of more channels."""
    trained.save_pretrained(tmp_path / "vae")
    members = {"hr.mkv": encode_bytes(to_frames(clips[0]).numpy()), "json": b"{}"}
    folder = open_folder(tmp_path / "data")
    shard = write_shard(folder, 0, [Sample("a", members)])
    write_manifest(folder, "clips", [shard])
    folders = "--data", f"{tmp_path}/data", "--extend", f"{tmp_path}/vae", "--output", f"{tmp_path}/more"
    monkeypatch.setattr(sys, "argv", ["initialise", *folders, "--channels", str(CHANNELS)])
    initialise_small_vae.main()
    assert load_vae(tmp_path / "more").config.z_dim == CHANNELS

    dit = VSRTransformer(latent_channels=HAVE, num_attention_heads=2, attention_head_dim=12, ffn_dim=8, num_layers=1)
    dit.save_pretrained(tmp_path / "dit")
    folders = "--model", f"{tmp_path}/dit", "--output", f"{tmp_path}/wider"
    monkeypatch.setattr(sys, "argv", ["more_channels", *folders, "--channels", str(CHANNELS)])
    more_channels.main()
    assert load_transformer(tmp_path / "wider", saved_config(tmp_path / "wider")).config.latent_channels == CHANNELS
    monkeypatch.setattr(sys, "argv", ["more_channels", *folders, "--channels", str(HAVE)])
    with pytest.raises(UserError, match="6 channels: the model has 6 already"):
        more_channels.main()
