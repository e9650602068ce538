"""Fit the tiny preset's VAE: PCA of pixel blocks first, then gradient descent on encoder and decoder together.

    python -m tools.fit_tiny_vae --input DIR … --held-out VIDEO --output assets/tiny/vae [--steps 140] [--seed 0]

`--input` takes folders of videos (`python -m tools.photo_clips` makes some from photographs). The decoder meets noisy
latents, because those it will decode are predicted, not encoded. `--encoder VAE` keeps that VAE's encoder and its
normalisation and fits the decoder alone: shards and models made with them stay valid. The folder written holds the
weights and `fit.json`: command, seed, data, and PSNR on the held-out video.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, run_command
from common.progress import progress
from common.video_probe import VIDEO_SUFFIXES
from common.video_reader import read_video
from metrics.decibel import psnr_db
from pipeline.model.small_vae import SmallVideoVAE
from pipeline.model.tiny_vae import TinyVideoVAE
from pipeline.model.vae import load_vae

FRAMES, SIDE, BATCH = 9, 128, 4
#: latents_std = deviation ** EXPONENT (times a constant): 1 would whiten, and give detail nobody sees the weight of
#: what everybody sees; 0 would let the noise of flow matching drown the detail. Measured in between.
EXPONENT = 0.25
#: deviation of the decoder's noise, in normalised latents: each sample draws its own between 0 and this [ours]
NOISE = 0.4
#: latents that share one part of the noise: the DiT's patch, whose errors show as blocks
PATCH = 2


def load_clips(folders: list[Path], density: float, generator: np.random.Generator) -> Tensor:
    """Random 9x128x128 crops, uint8 (N, 3, 9, 128, 128); videos that are too small are left out.

    Args:
        density: crops per 9x128x128 pixels of video, so that long and large ones count for more.
    """
    paths = sorted(path for folder in folders for path in _videos(folder))
    if not paths:
        raise UserError(f"no video ({', '.join(VIDEO_SUFFIXES)}) under {', '.join(map(str, folders))}")
    clips = []
    with progress(len(paths), "reading", "video") as bar:
        for path in paths:
            video = read_video(path)
            frames, height, width = video.shape[:3]
            volumes = (frames // FRAMES) * (height // SIDE) * (width // SIDE)
            for _ in range(max(1, round(density * volumes)) if volumes else 0):
                start, top, left = (
                    generator.integers(0, extent - wanted + 1)
                    for extent, wanted in ((frames, FRAMES), (height, SIDE), (width, SIDE))
                )
                crop = video[start : start + FRAMES, top : top + SIDE, left : left + SIDE]
                clips.append(torch.from_numpy(np.ascontiguousarray(crop)).permute(3, 0, 1, 2).contiguous())
            bar.advance(1)
    if not clips:
        raise UserError(f"no video of at least {FRAMES} frames of {SIDE}x{SIDE} among {len(paths)}")
    return torch.stack(clips)


def _videos(entry: Path) -> list[Path]:
    if not entry.exists():
        raise UserError(f"--input {entry} does not exist")
    return [path for path in entry.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES] if entry.is_dir() else [entry]


def to_pixels(clips: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return clips.float() / 127.5 - 1


def block_vectors(pixels: Tensor, frames: int) -> Tensor:
    """(B, 3, F, H, W) cut into blocks of `frames` x 8 x 8, each flattened like a convolution kernel."""
    x = pixels.unfold(2, frames, frames).unfold(3, 8, 8).unfold(4, 8, 8)
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, 3 * frames * 64)


def principal_axes(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` axes (rows) of the uncentred covariance, and the deviation along each.

    Uncentred, because mid-grey is the natural origin: a bias learned from one collection would tint another.
    """
    variances, axes = torch.linalg.eigh(vectors.T @ vectors / len(vectors))
    return axes.flip(1)[:, :count].T, variances.flip(0)[:count].clamp_min(0).sqrt()


@torch.no_grad()
def initialise(vae: TinyVideoVAE, clips: Tensor) -> None:
    """Set the four linear maps to PCA. The first frame's axes count double: a still scene then has equal latents."""
    pixels = to_pixels(clips)
    channels = vae.config.z_dim
    later, _ = principal_axes(block_vectors(pixels[:, :, 1:], 4), channels)
    first, _ = principal_axes(block_vectors(pixels[:, :, :1], 1), channels)
    for axes, gain, encode, decode in (
        (later, 1.0, vae.encode_next, vae.decode_next),
        (first, 2.0, vae.encode_first, vae.decode_first),
    ):
        kernel = axes.reshape(encode.weight.shape)
        encode.weight.copy_(gain * kernel)
        decode.weight.copy_(kernel / gain)
        encode.bias.zero_()
        decode.bias.zero_()


@torch.no_grad()
def normalise(vae: TinyVideoVAE, clips: Tensor) -> None:
    """Record latents_mean and latents_std of the latents of `clips`."""
    normalise_by(vae, torch.cat([vae.encode(to_pixels(batch)).latent_dist.mode() for batch in clips.split(64)]))


def normalise_by(vae: TinyVideoVAE | SmallVideoVAE, latents: Tensor) -> None:
    """Record latents_mean and latents_std so that these latents (N, C, T, h, w) have mean square 1 over channels."""
    mean = latents.mean((0, 2, 3, 4))
    deviation = latents.std((0, 2, 3, 4))
    scale = (deviation ** (2 - 2 * EXPONENT)).mean().sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=(scale * deviation**EXPONENT).tolist())


@torch.no_grad()
def held_out_psnr_db(vae: TinyVideoVAE, clips: Tensor) -> float:
    """PSNR over all pixels of all clips."""
    errors = []
    for batch in clips.split(16):
        pixels = to_pixels(batch)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(((decoded - pixels) ** 2).mean((1, 2, 3, 4)))
    return psnr_db(torch.cat(errors).mean().item(), peak=2.0)


def latent_noise(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Errors as a one-step model makes them, for normalised latents (B, C, T, h, w): some of each latent's own, some
    common to a patch of 2x2, of a strength between 0 and `NOISE` per sample."""
    batch, channels, frames, height, width = latents.shape
    own = torch.randn(latents.shape, generator=generator)
    coarse = torch.randn((batch, channels, frames, -(-height // PATCH), -(-width // PATCH)), generator=generator)
    shared = coarse.repeat_interleave(PATCH, 3).repeat_interleave(PATCH, 4)[..., :height, :width]
    strength, balance = torch.rand((2, batch, 1, 1, 1, 1), generator=generator)
    return NOISE * strength * (balance.sqrt() * own + (1 - balance).sqrt() * shared)


def train(vae: TinyVideoVAE, clips: Tensor, steps: int, seed: int, decoder_only: bool = False) -> None:
    """Minimise the error of what is decoded from noisy latents, in `steps` updates of `BATCH` clips."""
    generator = torch.Generator().manual_seed(seed)
    vae.requires_grad_(True)
    for name, parameter in vae.named_parameters():
        if decoder_only and name.startswith("encode"):
            parameter.requires_grad_(False)
    trained = {name: p for name, p in vae.named_parameters() if p.requires_grad}
    linear = [p for name, p in trained.items() if name.startswith(("encode", "decode"))]
    network = [p for name, p in trained.items() if name.startswith("refine")]
    rates = (1e-4, 1e-3)
    optimizer = torch.optim.AdamW(
        [{"params": linear, "lr": rates[0]}, {"params": network, "lr": rates[1]}], betas=(0.9, 0.99), weight_decay=0
    )
    scale = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with progress(steps, "fitting", "step") as bar:
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
            chosen = torch.randint(len(clips), (BATCH,), generator=generator)
            # Random offsets, so that block borders fall everywhere.
            top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
            pixels = to_pixels(clips[chosen])[..., top : top + SIDE - 8, left : left + SIDE - 8].contiguous()
            latents = vae.encode(pixels).latent_dist.mode()
            decoded = vae.decode(latents + scale * latent_noise(latents, generator)).sample
            loss = (decoded - pixels).square().mean() + 0.02 * (decoded - pixels).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.advance(1, loss=f"{loss.item():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="a video that is not in --input")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--density", type=float, default=1.0, help="crops per 9x128x128 pixels of video")
    parser.add_argument("--encoder", type=Path, help="a VAE folder whose encoder is kept; its decoder goes on")
    parser.add_argument("--steps", type=int, default=140, help=f"updates of {BATCH} clips")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = np.random.default_rng(arguments.seed)
    clips = load_clips(arguments.input, arguments.density, generator)
    held_out = load_clips([arguments.held_out], 0.5, generator)
    if arguments.encoder:
        vae = load_vae(arguments.encoder)
        if not isinstance(vae, TinyVideoVAE):
            raise UserError(f"--encoder {arguments.encoder} is not a TinyVideoVAE")
    else:
        vae = TinyVideoVAE(z_dim=arguments.channels)
        initialise(vae, clips[torch.randperm(len(clips))[:600]])
        normalise(vae, clips[:600])
    before_db = held_out_psnr_db(vae, held_out)
    train(vae, clips, arguments.steps, arguments.seed, decoder_only=arguments.encoder is not None)
    if not arguments.encoder:
        normalise(vae, clips[:600])
    record = {
        "command": " ".join(["python -m tools.fit_tiny_vae", *sys.argv[1:]]),
        "seed": arguments.seed,
        "clips": len(clips),
        "steps": arguments.steps,
        "held_out": arguments.held_out.name,
        "held_out_psnr_db": {"before": round(before_db, 2), "fitted": round(held_out_psnr_db(vae, held_out), 2)},
    }
    vae.save_pretrained(arguments.output)
    (arguments.output / "fit.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    run_command(main)
