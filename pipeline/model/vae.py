"""Pixels to latents and back, the same for Wan's VAE and the small ones.

Latents are normalised per channel, (z - mean) / std, with the constants in the VAE's own configuration; nothing outside
this file sees raw ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from common.bit_depth import BitDepth
from common.errors import UserError
from common.scale import SCALE
from pipeline.model.small_vae import SmallVideoVAE
from pipeline.model.tiny_vae import TinyVideoVAE

VAE: TypeAlias = AutoencoderKLWan | SmallVideoVAE | TinyVideoVAE

SPATIAL_FACTOR, TEMPORAL_FACTOR = 8, 4  # [paper]


def load_vae(folder: str | Path) -> VAE:
    """Open a VAE folder (diffusers layout, safetensors), chosen by `_class_name` in its config.json.

    Raises:
        UserError: no such folder, an unknown class, or missing weights.
    """
    try:
        vae = vae_class(folder).from_pretrained(folder, use_safetensors=True)
    except OSError as error:
        raise UserError(f"cannot load the VAE in {folder}: {str(error).splitlines()[0]}") from None
    return vae.requires_grad_(False).eval()


def vae_class(folder: str | Path) -> type[VAE]:
    """What `_class_name` in a VAE folder's config.json names.

    Raises:
        UserError: no such folder, or an unknown class.
    """
    folder = Path(folder)
    try:
        name = json.loads((folder / "config.json").read_text())["_class_name"]
    except FileNotFoundError:
        raise UserError(f"no VAE in {folder}: config.json is missing; give a folder saved by diffusers") from None
    except (json.JSONDecodeError, KeyError):
        raise UserError(f"{folder / 'config.json'} is not a diffusers configuration with _class_name") from None
    classes: dict[str, type[VAE]] = {
        "AutoencoderKLWan": AutoencoderKLWan,
        "SmallVideoVAE": SmallVideoVAE,
        "TinyVideoVAE": TinyVideoVAE,
    }
    if name not in classes:
        raise UserError(f"{folder} holds a {name}; known VAEs: {', '.join(classes)}")
    return classes[name]


def latent_shape(vae: VAE, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(C, T, h, w) of the latent of `frames` x `height` x `width` pixels.

    Raises:
        ValueError: frames is not 4k + 1, or a side is not a multiple of 8.
    """
    if frames % TEMPORAL_FACTOR != 1 or height % SPATIAL_FACTOR or width % SPATIAL_FACTOR:
        raise ValueError(f"{frames}x{height}x{width}: frames must be 4k + 1, height and width multiples of 8")
    grid = (frames - 1) // TEMPORAL_FACTOR + 1, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR
    return (vae.config.z_dim, *grid)


@torch.no_grad()
def encode_video(vae: VAE, pixels: Tensor) -> Tensor:
    """Encode without randomness (the posterior's mode).

    Args:
        pixels: (B, 3, F, H, W) in [-1, 1], F = 4k + 1, H and W multiples of 8.

    Returns:
        Normalised latents, float32, (B, C, (F-1)/4 + 1, H/8, W/8).
    """
    latent_shape(vae, *pixels.shape[2:])
    raw = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = _normalisation(vae, raw.device)
    return (raw - mean) / std


@torch.no_grad()
def decode_latents(vae: VAE, latents: Tensor) -> Tensor:
    """Normalised latents (B, C, T, h, w) to pixels, float32 in [-1, 1], (B, 3, 4(T-1) + 1, 8h, 8w)."""
    return decode_with_gradient(vae, latents).clamp(-1, 1)


def decode_with_gradient(vae: VAE, latents: Tensor) -> Tensor:
    """`decode_latents`, not clamped, for losses in pixels."""
    latents = latents.to(vae.device, torch.float32)
    mean, std = _normalisation(vae, latents.device)
    return vae.decode((latents * std + mean).to(vae.dtype)).sample.float()


def upsample_low_resolution(frames: np.ndarray | Tensor) -> Tensor:
    """LR frames enlarged ×4 in pixels, as the model is conditioned on them [note].

    Args:
        frames: uint8 or uint16 (F, h, w, 3).

    Returns:
        float32 (3, F, 4h, 4w) in [-1, 1]; bicubic, clamped.
    """
    return enlarge(to_pixels(frames))


def enlarge(pixels: Tensor) -> Tensor:
    """(…, F, h, w) to (…, F, 4h, 4w), as `upsample_low_resolution` does."""
    frames = pixels.flatten(0, -3)[:, None]
    enlarged = F.interpolate(frames, scale_factor=SCALE, mode="bicubic", align_corners=False)
    return enlarged.clamp(-1, 1)[:, 0].unflatten(0, pixels.shape[:-2])


def to_pixels(frames: np.ndarray | Tensor) -> Tensor:
    """uint8, or uint16 in 0…65535, (F, H, W, 3) to float32 (3, F, H, W) in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(frames)) if isinstance(frames, np.ndarray) else frames
    half = 127.5 if tensor.dtype == torch.uint8 else 32767.5
    return tensor.permute(3, 0, 1, 2).float() / half - 1


def to_frames(pixels: Tensor, bit_depth: BitDepth = 8) -> Tensor:
    """float (3, F, H, W) in [-1, 1] to (F, H, W, 3), rounded: uint8, or uint16 of `bit_depth` bits."""
    white, dtype = 2**bit_depth - 1, torch.uint8 if bit_depth == 8 else torch.uint16
    return ((pixels.float() + 1) * (white / 2)).round().clamp(0, white).to(dtype).permute(1, 2, 3, 0)


def _normalisation(vae: VAE, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
