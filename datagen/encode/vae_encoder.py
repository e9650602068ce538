"""Clips to latents: what the VAE actor calls."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from safetensors.torch import save


def latents_member(z_hr: torch.Tensor, z_lr: torch.Tensor) -> bytes | None:
    """The member `latents.safetensors` of a sample; None where a value is NaN or infinite."""
    if not (z_hr.isfinite().all() and z_lr.isfinite().all()):
        return None
    # copies: parts of one batch share its memory, which safetensors refuses
    return save({"z_hr": z_hr.clone(), "z_lr": z_lr.clone()})


class Encoder:
    """A VAE in memory, on the GPU where there is one. One per Ray actor.

    Every call of the VAE takes a batch of the same size, filled up where clips are short: a GPU picks its kernels by
    shape, and a clip's latents must not depend on which others are encoded with it. On a CPU that size is one, which
    is as fast and holds less.
    """

    def __init__(self, folder: str, threads: int, batch_size: int = 1) -> None:
        from pipeline.model.vae import load_vae

        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._batch_size = batch_size if self._device.type == "cuda" else 1
        self._vae = load_vae(folder).to(self._device)

    def latents(self, hr: list[np.ndarray], lr: list[np.ndarray]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """z_hr of each HR clip and z_lr of each LR clip, bf16 (C, T, H/8, W/8) on the CPU.

        Args:
            hr: uint8 (F, H, W, 3) each. lr: uint8 (F, H/4, W/4, 3) each, not necessarily as many.
        """
        latents = list(self._encoded(hr, lr))
        return latents[: len(hr)], latents[len(hr) :]

    def free_memory(self) -> None:
        """Give back what the GPU's allocator keeps: a clip may fit alone that did not fit beside others."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _encoded(self, hr: list[np.ndarray], lr: list[np.ndarray]) -> Iterator[torch.Tensor]:
        from pipeline.model.vae import encode_video, to_pixels, upsample_low_resolution

        clips = [(to_pixels, clip) for clip in hr] + [(upsample_low_resolution, clip) for clip in lr]
        for first in range(0, len(clips), self._batch_size):
            part = clips[first : first + self._batch_size]
            pixels = [enlarge(clip).to(self._device) for enlarge, clip in part]
            pixels += pixels[-1:] * (self._batch_size - len(part))
            yield from encode_video(self._vae, torch.stack(pixels))[: len(part)].to(torch.bfloat16).cpu()
