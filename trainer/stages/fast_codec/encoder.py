"""An encoder from LR pixels to z^LR, which spares enlarging the clip and the VAE's encoder.

L = mean‖ẑ - z^LR‖² + λ_1·mean|ẑ - z^LR|
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.model.fast_codec import GROUP, LR_PIXELS, LowResolutionEncoder
from pipeline.model.vae import to_pixels
from trainer.planning.memory import saved_bytes
from trainer.stages.fast_codec.config import LrEncoderConfig
from trainer.stages.losses import reconstruction_loss
from trainer.stages.parameter_groups import linear_apart
from trainer.stages.stage import Meter, StageSetup, TrainingStage

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch
    from trainer.planning.memory import ActivationSizes


class LrEncoderStage(TrainingStage):
    """One network, whole clips."""

    preview_names = ("lr_encoder",)

    def __init__(self, setup: StageSetup) -> None:
        super().__init__(setup)
        self.lr_encoder = self.exported = setup.network(
            "lr_encoder", linear_apart(setup.modules["lr_encoder"], self.config.linear_learning_rate)
        )
        self.networks = {"lr_encoder": self.lr_encoder}

    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """The encoder descends L."""
        with self.lr_encoder.updating():
            for batch in batches:
                loss = reconstruction_loss(
                    self.lr_encoder(self._low_resolution(batch)), self.latents(batch, "z_lr"), self.config.l1_weight
                )
                self.lr_encoder.backward(loss)
                meter.add(loss=loss)
            meter.add(gradient_norm_lr_encoder=self.lr_encoder.step())

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """What it makes of the LR clips."""
        return {"lr_encoder": self.lr_encoder.frozen(self._low_resolution(batch)).float()}

    def tokens_per_sample(self, batch: Batch) -> int:
        """Places of the latent."""
        return math.prod(batch.tensors["z_lr"].shape[2:])

    def _low_resolution(self, batch: Batch) -> Tensor:
        """(B, 3, F, h, w) in [-1, 1]."""
        return torch.stack([to_pixels(clip) for clip in batch.tensors["lr"]]).to(self._device)


def activation_bytes(sizes: ActivationSizes, config: LrEncoderConfig) -> float:
    """Of whole clips."""
    side, latent_frames = 16, 2
    with torch.device("meta"):
        encoder = LowResolutionEncoder(sizes.latent_channels, **config.shape.model_dump())
        clip = torch.empty(1, 3, GROUP * (latent_frames - 1) + 1, LR_PIXELS * side, LR_PIXELS * side)
    return saved_bytes(encoder, clip) / (latent_frames * side**2) * sizes.places * sizes.width / 4
