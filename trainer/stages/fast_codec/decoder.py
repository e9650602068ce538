"""A fast decoder for a frozen VAE: latents and LR pixels to pixels, on the stored clips of a dataset folder.

    L = R(y, x) + λ_full·R(y, y_full) + λ_P·L_P(y, x) + λ_grid·L_grid(y, x) + λ_adv·L_G(y)
    R(y, x) = mean‖y - x‖² + λ_1·mean|y - x|

x is a crop of the HR clip; y is decoded from the crop of a latent and of the LR clip, y_full from the same latent by
the VAE. The latent is z^HR or, in a share of the samples, the student's ẑ0: what will be decoded, and where LR says
most that the latent does not.

With `student_optimizer` the student descends L, too: ẑ0 is cut off into a leaf, the decoder's backward leaves ∂L/∂ẑ0
there, and the student's engine is given (ẑ0·∂L/∂ẑ0).sum(), as in Stage II.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pipeline.model.fast_codec import LR_PIXELS, FastDecoder
from pipeline.model.vae import SPATIAL_FACTOR, to_pixels
from pipeline.sampling import one_step
from trainer.planning.memory import saved_bytes
from trainer.stages.crops import crop_starts, require_room
from trainer.stages.dual_stream.switches import penalties, with_perturbed
from trainer.stages.fast_codec.config import FastDecoderConfig
from trainer.stages.losses import (
    discriminator_loss,
    generator_loss,
    grid_loss,
    multiscale_gradient_loss,
    reconstruction_loss,
)
from trainer.stages.parameter_groups import linear_apart
from trainer.stages.stage import Meter, StageSetup, TrainingStage

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch
    from trainer.engine.network import Network
    from trainer.planning.memory import ActivationSizes


class Crop(NamedTuple):
    """One micro-batch: the same frames and places of latent, LR and HR; pixels in [-1, 1]."""

    z: Tensor
    low_resolution: Tensor
    hr: Tensor


class FastDecoderStage(TrainingStage):
    """The decoder, and as far as the configuration asks for them: student, VAE, LPIPS, discriminator."""

    def __init__(self, setup: StageSetup) -> None:
        super().__init__(setup)
        groups = linear_apart(setup.modules["fast_decoder"], self.config.linear_learning_rate)
        self.fast_decoder = self.exported = setup.network("fast_decoder", groups)
        others = {name: setup.network(name) for name in setup.modules if name != "fast_decoder"}
        self.networks = {"fast_decoder": self.fast_decoder} | others
        self.student, self.full_decoder, self.perceptual, self.discriminator = (
            self.networks.get(name) for name in ("student", "full_decoder", "perceptual", "discriminator")
        )
        self.preview_names = ("fast_decoder", *(["fast_decoder_of_student"] if self.student else []))

    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """Decoder and trained student descend L, then the discriminator L_D on what was decoded."""
        pairs, student = [], self._trained_student
        with self.fast_decoder.updating(), nullcontext() if student is None else student.updating():
            for batch in batches:
                z0 = self._latents(step, batch)
                leaf = z0.detach().requires_grad_(student is not None)
                crop = self._crop(batch, leaf, step)
                decoded = self.fast_decoder(crop.z, crop.low_resolution).float()
                self.fast_decoder.backward(self._loss(step, crop, decoded, meter))
                pairs.append((crop, decoded.detach(), self.draws(step, batch)))
                if student is not None and leaf.grad is not None:
                    # Both engines divide by it, and the leaf's gradient has been divided once.
                    gradient = leaf.grad * self.fast_decoder.config.gradient_accumulation
                    student.backward((z0 * gradient).sum())
            meter.add(gradient_norm_fast_decoder=self.fast_decoder.step())
            if student is not None:
                meter.add(gradient_norm_student=student.step())
        if self.discriminator is None:
            return
        with self.discriminator.updating():
            for crop, decoded, draws in pairs:
                clips = torch.cat([with_perturbed(self.config, draws, crop.hr, decoded), decoded])
                count = len(clips) // len(decoded)
                logits = self.discriminator(clips, crop.low_resolution.repeat(count, 1, 1, 1, 1)).float().chunk(count)
                d_hr, *perturbed, d_s = ([d] for d in logits)
                loss_d = loss = discriminator_loss(d_hr, d_s, self.config.gan_loss)
                for name, penalty in penalties(self.config, d_hr, d_s, perturbed).items():
                    loss = loss + getattr(self.config, f"{name}_weight") * penalty
                    meter.add(**{f"loss_{name}": penalty})
                self.discriminator.backward(loss)
                meter.add(loss_discriminator=loss_d, d_hr=d_hr[0].mean(), d_s=d_s[0].mean())
            meter.add(gradient_norm_discriminator=self.discriminator.step())

    def _loss(self, step: int, crop: Crop, decoded: Tensor, meter: Meter) -> Tensor:
        """L, its terms noted."""
        config = self.config
        loss_pixels = reconstruction_loss(decoded, crop.hr, config.l1_weight)
        if self.perceptual is not None:
            loss_perceptual = self.perceptual.frozen(decoded, crop.hr)
        else:
            loss_perceptual = multiscale_gradient_loss(decoded, crop.hr, config.gradient_scales)
        loss = loss_pixels + config.perceptual_weight * loss_perceptual
        meter.add(loss_pixels=loss_pixels, loss_perceptual=loss_perceptual)
        if config.grid_weight:
            loss_grid = grid_loss(decoded, crop.hr, SPATIAL_FACTOR)
            loss = loss + config.grid_weight * loss_grid
            meter.add(loss_grid=loss_grid)
        if self.full_decoder is not None:
            loss_full = reconstruction_loss(decoded, self.full_decoder.frozen(crop.z), config.l1_weight)
            loss = loss + config.full_decoder_weight * loss_full
            meter.add(loss_full_decoder=loss_full)
        if self.discriminator is not None and step >= config.adversarial_from_step:
            d_s = self.discriminator.frozen(decoded, crop.low_resolution).float()
            d_hr: list[Tensor] = []
            if config.gan_loss == "relativistic":
                with torch.no_grad():
                    d_hr = [self.discriminator.frozen(crop.hr, crop.low_resolution).float()]
            loss_adversarial = generator_loss([d_s], d_hr, config.gan_loss)
            loss = loss + config.adversarial_weight * loss_adversarial
            meter.add(loss_adversarial=loss_adversarial)
        meter.add(loss=loss)
        return loss

    @property
    def _trained_student(self) -> Network | None:
        """The student where it descends L, too."""
        return None if self.config.student_optimizer is None else self.student

    def objective(self, step: int) -> str:
        """With the adversarial term or without."""
        adversarial = self.discriminator is not None and step >= self.config.adversarial_from_step
        return f"{self.name} with L_G" if adversarial else self.name

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """Crops decoded from z^HR and from the student's latent; pixels (B, 3, F, H, W)."""
        latents = {"fast_decoder": self.latents(batch, "z_hr")}
        if self.student is not None:
            latents["fast_decoder_of_student"] = self._student_latents(-1, batch, self.student.frozen)
        crops = {name: self._crop(batch, z, None) for name, z in latents.items()}
        return {name: self.fast_decoder.frozen(crop.z, crop.low_resolution).float() for name, crop in crops.items()}

    def target(self, batch: Batch) -> Tensor:
        """The middle crop of each HR clip."""
        return self._crop(batch, self.latents(batch, "z_hr"), None).hr

    def tokens_per_sample(self, batch: Batch) -> int:
        """Places of a crop's latent."""
        return math.prod(self._places)

    @property
    def _places(self) -> tuple[int, int, int]:
        """(T, h, w) of a crop's latent."""
        side = self.config.side // SPATIAL_FACTOR
        return (self.config.frames - 1) // 4 + 1, side, side

    def _latents(self, step: int, batch: Batch) -> Tensor:
        """z^HR, or the student's ẑ0 in the samples drawn for it."""
        z_hr = self.latents(batch, "z_hr")
        if self.student is None:
            return z_hr
        # Computed for all: every rank makes the same calls.
        from_student = self.draws(step, batch).uniform("student") < self.config.student_fraction
        trained = self._trained_student
        with torch.set_grad_enabled(trained is not None):
            z0 = self._student_latents(step, batch, trained or self.student.frozen)
        return torch.where(from_student.view(-1, 1, 1, 1, 1), z0, z_hr)

    def _student_latents(self, step: int, batch: Batch, student: Callable[..., Any]) -> Tensor:
        z_lr = self.latents(batch, "z_lr")
        noise = self.draws(step, batch).noise("generator", z_lr)
        return one_step(lambda *x: student(*x).velocity, noise, z_lr, self.prompts(batch))

    def _crop(self, batch: Batch, z: Tensor, step: int | None) -> Crop:
        """The first frames of each sample, at places that `step` draws; None: in the middle."""
        latent_frames, height, width = self._places
        require_room(self.name, ("frames", "side"), (self.config.frames, *[self.config.side] * 2), batch.tensors["hr"])
        room = (1, z.shape[3] - height + 1, z.shape[4] - width + 1)
        starts = crop_starts(batch.keys, room, None if step is None else (self._seed, self.name, step, 0))

        def pixels(name: str, px: int) -> Tensor:
            clips = batch.tensors[name][:, : self.config.frames]
            parts = [
                to_pixels(clip[:, y * px : (y + height) * px, x * px : (x + width) * px])
                for clip, (_, y, x) in zip(clips, starts, strict=True)
            ]
            return torch.stack(parts).to(self._device)

        latents = [
            latent[:, :latent_frames, y : y + height, x : x + width]
            for latent, (_, y, x) in zip(z, starts, strict=True)
        ]
        return Crop(torch.stack(latents), pixels("lr", LR_PIXELS), pixels("hr", SPATIAL_FACTOR))


def activation_bytes(sizes: ActivationSizes, config: FastDecoderConfig) -> float:
    """Of one crop: the decoder never sees a clip in full. A student that is trained does."""
    place = config.side // SPATIAL_FACTOR
    with torch.device("meta"):
        decoder = FastDecoder(sizes.latent_channels, **config.shape.model_dump())
        z = torch.empty(1, sizes.latent_channels, (config.frames - 1) // 4 + 1, place, place)
        low_resolution = torch.empty(1, 3, config.frames, LR_PIXELS * place, LR_PIXELS * place)
    student = sizes.update() if config.student_optimizer is not None else 0.0
    return saved_bytes(decoder, z, low_resolution) * sizes.width / 4 + student
