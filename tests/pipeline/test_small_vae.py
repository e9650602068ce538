"""The small VAE: orthonormal lapped start, causal, decoded piece by piece, smooth where the block transform is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.seeding import seeded_noise
from pipeline.model.small_vae import GROUP, STRIDE, WINDOW, SmallVideoVAE
from pipeline.model.vae import decode_latents, encode_video, load_vae
from tools.initialise_small_vae import coefficients, cosines, initialise, kernels, lapped_transform


@pytest.fixture(scope="module")
def vae() -> SmallVideoVAE:
    """Every parameter random, also those that begin at zero."""
    torch.manual_seed(0)
    vae = SmallVideoVAE(z_dim=6, encoder_dims=(8, 8, 12), decoder_dims=(12, 8, 8, 6), decoder_blocks=(1, 1, 1))
    vae.register_to_config(latents_std=[0.5 + 0.1 * channel for channel in range(6)])
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter += 0.05 * seeded_noise(parameter.shape, name)
    return vae.eval().requires_grad_(False)


def pixels(frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    return seeded_noise((1, 3, frames, height, width), "pixels", frames)


def test_lapped_transform_reconstructs_any_signal() -> None:
    transform = lapped_transform()
    assert transform.shape == (STRIDE, WINDOW)
    total = torch.zeros((56, 56), dtype=torch.float64)
    for block in range(6):
        window = slice(STRIDE * block, STRIDE * block + WINDOW)
        total[window, window] += transform.T @ transform
    inner = slice(STRIDE, 56 - STRIDE)
    torch.testing.assert_close(total[inner, inner], torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-12)
    for size, kind in ((4, 2), (4, 4), (8, 2)):
        matrix = cosines(size, kind)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


def test_all_axes_reconstruct_a_clip_exactly_away_from_the_border() -> None:
    full = 3 * GROUP * STRIDE**2
    vae = SmallVideoVAE(z_dim=full, encoder_dims=(4, 4, 4), decoder_dims=(4, 4, 4, 4), decoder_blocks=(0, 0, 0))
    with torch.no_grad():
        for layer in (vae.linear_encode, vae.linear_decode):
            layer.weight.copy_(kernels(torch.eye(full)))
            layer.bias.zero_()
        clip = pixels(9)
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample
    inner = (..., slice(STRIDE, -STRIDE), slice(STRIDE, -STRIDE))
    torch.testing.assert_close(decoded[inner], clip[inner], rtol=0, atol=1e-4)
    assert coefficients(clip).shape == (3 * 4 * 6, full)


def test_initialised_from_clips_it_codes_them_with_few_channels() -> None:
    torch.manual_seed(1)
    vae = SmallVideoVAE(z_dim=24)
    coarse = torch.nn.functional.interpolate(torch.randn(6, 3, 3, 8, 8), size=(9, 64, 64), mode="trilinear")
    clips = [*coarse[:4]]
    initialise(vae, clips)
    with torch.no_grad():
        decoded, z = vae(coarse[4:])
    assert (decoded - coarse[4:]).square().mean() < 0.05 * coarse[4:].square().mean()
    assert 0.5 < z.square().mean() < 2, "normalised latents have mean square 1"


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_shapes(vae: SmallVideoVAE, frames: int) -> None:
    z = encode_video(vae, pixels(frames))
    assert z.shape == (1, 6, (frames - 1) // 4 + 1, 4, 6)
    assert decode_latents(vae, z).shape == (1, 3, frames, 32, 48)


def test_later_frames_change_nothing_before_them(vae: SmallVideoVAE) -> None:
    clip, changed = pixels(9), pixels(9)
    changed[:, :, 5:] += 1
    z, other = (vae.encode(x).latent_dist.mode() for x in (clip, changed))
    assert torch.equal(z[:, :, :2], other[:, :, :2]) and not torch.equal(z[:, :, 2], other[:, :, 2])
    assert torch.equal(vae.decode(z).sample[:, :, :5], vae.decode(other).sample[:, :, :5])


def test_decoded_piece_by_piece_it_is_the_same_video(vae: SmallVideoVAE) -> None:
    z = vae.encode(pixels(17)).latent_dist.mode()
    full = vae.decode(z).sample
    pieces, before = [], None
    for start, stop in ((0, 1), (1, 3), (3, 5)):
        pieces.append(vae.decode(z[:, :, start:stop], before).sample)
        before = z[:, :, stop - 1 : stop]
    torch.testing.assert_close(torch.cat(pieces, 2), full, rtol=0, atol=1e-5)


def test_a_change_of_one_latent_fades_out_without_an_edge() -> None:
    """A block transform's change ends at the square's border at full height."""
    torch.manual_seed(2)
    vae = SmallVideoVAE(z_dim=4)
    flat = torch.full((3, 5, 64, 64), 0.5) + 0.01 * torch.randn(3, 5, 64, 64)
    initialise(vae, [flat])
    z = torch.zeros(1, 4, 2, 8, 8)
    z[0, 0, 1, 4, 4] = 1.0  # the first axis is the mean of a window
    with torch.no_grad():
        change = (vae.decode(z).sample - vae.decode(torch.zeros_like(z)).sample)[0, 0, 3].abs()
    row = change[36]
    assert row[28] < 0.2 * row.max() and row[43] < 0.2 * row.max(), "little at the window's ends"
    assert row.diff().abs().max() < 0.5 * row.max(), "no step as high as the change itself"


def test_saved_and_loaded_it_is_the_same(vae: SmallVideoVAE, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    loaded = load_vae(tmp_path)
    assert isinstance(loaded, SmallVideoVAE)
    z = encode_video(vae, pixels(5))
    assert torch.equal(encode_video(loaded, pixels(5)), z)
    assert torch.equal(decode_latents(loaded, z), decode_latents(vae, z))


def test_forward_adds_noise_in_normalised_units(vae: SmallVideoVAE) -> None:
    clip = pixels(5)
    z = encode_video(vae, clip)
    noise = seeded_noise(z.shape, "noise")
    decoded, normalised = vae(clip, noise)
    torch.testing.assert_close(normalised, z)
    torch.testing.assert_close(decoded.clamp(-1, 1), decode_latents(vae, z + noise), rtol=1e-4, atol=1e-4)
