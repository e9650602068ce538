"""Candidates for one LR clip: the one-step model run from several noises, and the clip they are judged
against."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.seeding import seeded_noise
from pipeline.model.prompts import DEFAULT_PROMPT
from pipeline.model.vae import decode_latents
from pipeline.sampling import one_step
from pipeline.vsr_pipeline import open_pipeline
from preference.clips import Clip
from preference.config import PreferenceConfig


@dataclass(frozen=True)
class Candidates:
    """What the model made of one clip.

    Attributes:
        latents: float32 (N, C, T, h, w).
        noises: for each, the parts that `common.seeding.seeded_noise` makes its noise from.
        caption: the prompt.
    """

    latents: Tensor
    noises: list[list[str | int]]
    caption: str


def noise_parts(seed: int, key: str, index: int) -> list[str | int]:
    """Identity of the noise of candidate `index` of clip `key`."""
    return ["preference", seed, key, index]


class CandidateModel:
    """The one-step model of a model folder.

    Raises:
        UserError: no model folder, or a model that needs more than one step.
    """

    def __init__(self, folder: Path, config: PreferenceConfig, device: str) -> None:
        precision = {"transformer": getattr(torch, config.dtype), "default": torch.float32}
        pipeline = open_pipeline(folder, device, precision)
        steps = pipeline.config.num_inference_steps
        if steps != 1:
            raise UserError(f"{folder} is a {steps}-step model; pairs need the one-step model of the stage dual_stream")
        self._config = config
        self._device = device
        self._transformer, self._vae, self._prompts = (pipeline.transformer, pipeline.vae, pipeline.prompts)

    @torch.inference_mode()
    def candidates(self, clip: Clip) -> Candidates:
        """The one-step outputs for `clip`, one per noise."""
        caption = clip.metadata.get("caption", DEFAULT_PROMPT)
        prompt = self._prompts.embed([caption]).to(self._device)
        noises = [noise_parts(self._config.seed, clip.key, i) for i in range(self._config.candidates)]
        noise = torch.stack([seeded_noise(clip.z_lr.shape, *parts) for parts in noises])
        z_lr = clip.z_lr.to(self._device)
        outputs = []
        for part in noise.split(self._config.candidates_per_forward):
            many = part.shape[0]
            outputs.append(
                one_step(
                    self._velocity,
                    part.to(self._device),
                    z_lr.expand(many, *z_lr.shape),
                    prompt.expand(many, *prompt.shape[1:]),
                ).float()
            )
        return Candidates(torch.cat(outputs).cpu(), noises, caption)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent (C, T, h, w) to frames as metrics take them: float32 (F, 3, H, W) in [0, 1], CPU."""
        return self._decode(latent[None])[0]

    def decode_all(self, latents: Tensor) -> Iterator[Tensor]:
        """Each of (N, C, T, h, w) as from `decode`, some at a time."""
        for part in latents.split(self._config.candidates_per_forward):
            yield from self._decode(part)

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> Tensor:
        pixels = decode_latents(self._vae, latents.to(self._device))
        return ((pixels.float() + 1) / 2).clamp(0, 1).transpose(1, 2).cpu()

    def reference(self, clip: Clip) -> tuple[Tensor, str]:
        """The HR frames candidates are compared with, as from `decode`, and what they are: the dataset's own,
        or decoded from z_HR where it keeps latents only."""
        if clip.hr is not None:
            return clip.hr, "HR clip"
        return self.decode(clip.z_hr), "decoded z_hr"

    def _velocity(self, z_t: Tensor, t: Tensor, z_lr: Tensor, prompt: Tensor) -> Tensor:
        return self._transformer(z_t, t, z_lr, prompt).velocity


def model_fingerprint(folder: Path) -> str:
    """A hash over the weights and configurations of a model folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:16]
