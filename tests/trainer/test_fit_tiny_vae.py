"""The tiny preset's VAE: the noise its decoder is fitted with, and what `--encoder` leaves alone."""

from __future__ import annotations

import torch

from pipeline.model.tiny_vae import TinyVideoVAE
from tools.fit_tiny_vae import NOISE, initialise, latent_noise, normalise, to_pixels, train


def test_noise_is_partly_shared_by_patches_and_bounded():
    noise = latent_noise(torch.zeros(64, 8, 3, 15, 15), torch.Generator().manual_seed(0))
    within = (noise[..., 0:14:2] * noise[..., 1:15:2]).mean()  # columns 0 and 1, 2 and 3, … are of one patch
    across = (noise[..., 1:13:2] * noise[..., 2:14:2]).mean()
    variance = noise.square().mean()
    assert 0.2 < within / variance < 0.8
    assert abs(across) / variance < 0.02
    # a uniform strength's mean square is a third of its square at the upper end
    assert 0.6 < variance / (NOISE**2 / 3) < 1.5


def test_decoder_alone_is_fitted_and_reads_noisy_latents_better():
    torch.manual_seed(0)
    low = torch.rand(12, 3, 9, 16, 16)
    smooth = torch.nn.functional.interpolate(low, size=(9, 128, 128), mode="trilinear", align_corners=False)
    clips = (smooth * 255).to(torch.uint8)
    vae = TinyVideoVAE(z_dim=12, hidden_dim=16, num_blocks=1)
    initialise(vae, clips)
    normalise(vae, clips)
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    constants = vae.config.latents_mean, vae.config.latents_std

    def error() -> float:
        pixels = to_pixels(clips[:4])
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
            scale = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
            noise = latent_noise(latents, torch.Generator().manual_seed(7))
            return float((vae.decode(latents + scale * noise).sample - pixels).square().mean())

    unfitted = error()
    train(vae, clips, steps=12, seed=0, decoder_only=True)
    for name, parameter in vae.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("encode"), name
    assert (vae.config.latents_mean, vae.config.latents_std) == constants
    assert error() < unfitted
