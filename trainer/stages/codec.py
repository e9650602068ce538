"""A VAE for small models: pixels to latents and back, trained on the stored HR clips of a dataset folder.

    L = mean‖y - x‖² + λ_1·mean|y - x| + λ_∇·L_∇ + λ_grid·L_grid + λ_z·(mean z² - 1)²

x is a crop of a clip, z its normalised latent, y what is decoded from z + σ·ε. The noise is there because the latents
that will be decoded are predicted: a small change of a latent has to decode to a small, smooth change. λ_z keeps the
latents at the scale of that noise.

With `train_encoder: false` the decoder alone is trained. Shards and models made with the VAE stay valid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from common.config import Section
from common.errors import UserError
from pipeline.model.config import ModelConfig
from trainer.engine.config import OptimizerConfig
from trainer.planning.memory import saved_bytes
from trainer.stages.crops import CropFrames, crop_starts, require_room
from trainer.stages.losses import grid_loss, latent_scale_loss, multiscale_gradient_loss, reconstruction_loss
from trainer.stages.parameter_groups import linear_apart
from trainer.stages.random_draws import Draws
from trainer.stages.stage import Meter, NetworkSpec, ScheduleConfig, StageSetup, StageSpec, Trained, TrainingStage

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch
    from pipeline.model.small_vae import SmallVideoVAE
    from trainer.planning.memory import ActivationSizes


class CodecConfig(Section):
    """Numbers of the VAE's training."""

    #: frames of a crop, 4k + 1 [ours]
    frames: CropFrames = 5
    #: side of a crop in pixels, a multiple of 8, at most the stored clips' [ours]
    side: int = Field(default=128, ge=16, multiple_of=8)
    #: λ_1 [ours]
    l1_weight: float = Field(default=0.05, ge=0)
    #: λ_∇ [ours]
    gradient_weight: float = Field(default=0.05, ge=0)
    #: sizes at which gradients are compared, each half the one before [ours]
    gradient_scales: int = Field(default=3, ge=1)
    #: λ_grid, of squares of 8 px in what is decoded; 0: not looked at [ours]
    grid_weight: float = Field(default=0.0, ge=0)
    #: largest σ, in normalised latents; each sample draws its own between 0 and this [ours]
    latent_noise: float = Field(default=0.3, ge=0)
    #: λ_z [ours]
    latent_scale_weight: float = Field(default=0.01, ge=0)
    #: false: the encoder keeps its weights, and latents stay what they are [ours]
    train_encoder: bool = True
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-4, betas=(0.9, 0.99), weight_decay=0.0, warmup_updates=100
    )  # [ours]
    #: peak learning rate of the linear path, which begins as a lapped transform [ours: 0.03 of the convolutions']
    linear_learning_rate: float = Field(default=1e-5, gt=0)
    #: decay per update of the exported weights' EMA [ours]
    ema_decay: float = Field(default=0.998, ge=0, lt=1)


class Codec(TrainingStage):
    """One network, encoder and decoder; its batches hold the member `hr`."""

    preview_names = ("codec", "codec_noise_0.1")

    def __init__(self, setup: StageSetup) -> None:
        super().__init__(setup)
        if not self.config.train_encoder:
            for part in (setup.modules["codec"].linear_encode, setup.modules["codec"].encoder):
                part.requires_grad_(False)
        groups = linear_apart(setup.modules["codec"], self.config.linear_learning_rate)
        self.codec = self.exported = setup.network("codec", groups)
        self.networks = {"codec": self.codec}

    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """Encoder and decoder, or the decoder alone, descend L."""
        from pipeline.model.vae import SPATIAL_FACTOR

        config = self.config
        with self.codec.updating():
            for batch in batches:
                draws = self.draws(step, batch)
                x = self._crop(batch, step)
                decoded, z = self.codec(x, self._noise(draws, x, config.latent_noise * draws.uniform("strength")))
                loss_pixels = reconstruction_loss(decoded, x, config.l1_weight)
                loss_gradient = multiscale_gradient_loss(decoded, x, config.gradient_scales)
                loss_scale = latent_scale_loss(z)
                loss = loss_pixels + config.gradient_weight * loss_gradient + config.latent_scale_weight * loss_scale
                if config.grid_weight:
                    loss_grid = grid_loss(decoded, x, SPATIAL_FACTOR)
                    loss = loss + config.grid_weight * loss_grid
                    meter.add(loss_grid=loss_grid)
                self.codec.backward(loss)
                meter.add(
                    loss=loss, loss_pixels=loss_pixels, loss_gradient=loss_gradient, latent_energy=z.square().mean()
                )
            meter.add(gradient_norm_codec=self.codec.step())

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """Crops decoded from their latents, and from latents with noise of 0.1; pixels (B, 3, F, H, W)."""
        x, draws = self.target(batch), self.draws(-1, batch)
        strengths = (0.0, 0.1)
        return {
            name: self.codec.frozen(x, self._noise(draws, x, torch.full((len(x),), strength, device=x.device)))[0]
            for name, strength in zip(self.preview_names, strengths, strict=True)
        }

    def target(self, batch: Batch) -> Tensor:
        """The middle crop of each clip, from its first frame, pixels (B, 3, F, H, W) in [-1, 1]."""
        return self._crop(batch, None)

    def tokens_per_sample(self, batch: Batch) -> int:
        """Positions of a crop's latent."""
        from pipeline.model.vae import latent_shape

        _, *grid = latent_shape(self.codec.module, self.config.frames, self.config.side, self.config.side)
        return math.prod(grid)

    def _crop(self, batch: Batch, step: int | None) -> Tensor:
        """`frames` x `side` x `side` of each stored clip, where `step` draws it; None: in the middle."""
        from pipeline.model.vae import to_pixels

        clips = batch.tensors["hr"]
        wanted = (self.config.frames, self.config.side, self.config.side)
        require_room(self.name, ("frames", "side"), wanted, clips)
        room = [have - want + 1 for have, want in zip(clips.shape[1:4], wanted, strict=True)]
        starts = crop_starts(batch.keys, room, None if step is None else (self._seed, self.name, step, 0))
        crops = [
            to_pixels(clip[f : f + wanted[0], y : y + wanted[1], x : x + wanted[2]])
            for clip, (f, y, x) in zip(clips, starts, strict=True)
        ]
        return torch.stack(crops).to(self._device)

    def _noise(self, draws: Draws, x: Tensor, strength: Tensor) -> Tensor:
        from pipeline.model.vae import latent_shape

        shape = latent_shape(self.codec.module, *x.shape[2:])
        return strength.view(-1, 1, 1, 1, 1) * draws.noise("latent", torch.empty((len(x), *shape)))


def load_codec(folder: Path | None, model: ModelConfig, seed: int) -> SmallVideoVAE:
    """The VAE of `folder`, else an untrained one of the preset's channels."""
    from pipeline.model.small_vae import SmallVideoVAE
    from pipeline.model.vae import load_vae

    if folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return SmallVideoVAE(z_dim=model.transformer.latent_channels)
    vae = load_vae(folder)
    if not isinstance(vae, SmallVideoVAE):
        raise UserError(f"--init {folder} holds a {type(vae).__name__}; --stage codec trains a SmallVideoVAE")
    return vae.requires_grad_(True).train()


def export_codec(folder: Path, trained: Trained, init: Path | None = None) -> None:
    """Write a VAE folder with the trained weights."""
    from pipeline.model.small_vae import SmallVideoVAE
    from pipeline.model.vae import load_vae

    module, state = trained["codec"]
    if init is not None:  # what was not trained is not among the trained weights
        state = load_vae(init).state_dict() | state
    vae = SmallVideoVAE.from_config(module.config)
    vae.load_state_dict(state, strict=True)
    vae.register_to_config(_name_or_path="")  # diffusers notes the folder it was loaded from
    vae.save_pretrained(folder)


def activation_bytes(sizes: ActivationSizes, config: CodecConfig) -> float:
    """Of one crop: training never sees a clip in full."""
    from pipeline.model.small_vae import SmallVideoVAE

    with torch.device("meta"):
        return saved_bytes(SmallVideoVAE(), torch.empty(1, 3, config.frames, config.side, config.side))


SPEC = StageSpec(
    name="codec",
    summary="a VAE for small models",
    config=CodecConfig,
    networks=(NetworkSpec("codec", optimizer="optimizer", ema=True),),
    build=Codec,
    schedule=ScheduleConfig(steps=20_000, global_batch_size=8, learning_rate_schedule="cosine"),  # [ours]
    init="a VAE of tools/initialise_small_vae.py",
    members=("hr",),
    pixels=True,
    load=load_codec,
    export=export_codec,
    activation_bytes=activation_bytes,
)
