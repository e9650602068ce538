"""Clips to latents: the VAE actor, and what identifies a VAE."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from pipeline.errors import UserError


def vae_hash(folder: Path) -> str:
    """sha256 over the configuration and weights of a VAE folder: equal hashes give equal latents.

    Raises:
        UserError: no such folder, or no safetensors in it.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(
            f"model.vae: {folder} holds no VAE (config.json and *.safetensors); see the README on weights"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class Encoder:
    """A VAE in memory, on the GPU where there is one. One per Ray actor."""

    def __init__(self, folder: str, threads: int) -> None:
        from pipeline.vae import load_vae

        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._vae = load_vae(folder).to(self._device)

    def latents(self, hr: np.ndarray, lr: np.ndarray) -> list[bytes]:
        """The member `latents.safetensors` of each clip of a batch.

        On a GPU the batch goes through the VAE at once; on a CPU clip by clip, which is as fast and holds less.

        Args:
            hr: uint8 (B, F, H, W, 3). lr: uint8 (B, F, H/4, W/4, 3).

        Returns:
            B files of `z_hr`, `z_lr`, bf16 (C, T, H/8, W/8).
        """
        from pipeline.vae import upsample_low_resolution

        pixels = torch.from_numpy(hr.copy()).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)
        upsampled = torch.stack([upsample_low_resolution(clip) for clip in lr])
        z_hr, z_lr = self._encode(pixels), self._encode(upsampled)
        return [
            save({"z_hr": high.contiguous(), "z_lr": low.contiguous()})
            for high, low in zip(z_hr, z_lr, strict=True)
        ]

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """bf16 (B, C, T, H/8, W/8) on the CPU, of float32 (B, 3, F, H, W) in [-1, 1]."""
        from pipeline.vae import encode_video

        parts = [pixels] if self._device.type == "cuda" else pixels.split(1)
        return torch.cat(
            [encode_video(self._vae, part.to(self._device)).to(torch.bfloat16).cpu() for part in parts]
        )
