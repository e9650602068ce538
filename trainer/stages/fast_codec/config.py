"""Every number of the fast codec's two stages; the code that uses them stands in decoder.py and encoder.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from common.config import Section
from trainer.engine.config import OptimizerConfig
from trainer.stages.crops import CropFrames
from trainer.stages.dual_stream.config import GanLoss, HeadConfig

#: of both networks, trained from nothing [ours]
OPTIMIZER = OptimizerConfig(learning_rate=5e-4, betas=(0.9, 0.99), weight_decay=0.0, warmup_updates=100)


class DecoderShape(Section):
    """Shape of a fast decoder that starts from nothing; 11.9 M parameters at 16 latent channels."""

    #: widths at 1/8, 1/4, 1/2 and the full size [ours]
    dims: tuple[int, int, int, int] = (256, 128, 64, 32)
    #: memory blocks at 1/8, residual blocks at 1/4 and 1/2 [ours]
    blocks: tuple[int, int, int] = (6, 2, 1)


class EncoderShape(Section):
    """Shape of an LR encoder that starts from nothing; 4.1 M parameters at 16 latent channels."""

    #: width [ours]
    dim: int = Field(default=192, ge=1)
    #: memory blocks [ours]
    blocks: int = Field(default=4, ge=0)


class FastDecoderConfig(Section):
    """Numbers of the fast decoder's training."""

    shape: DecoderShape = DecoderShape()
    #: frames of a crop, 4k + 1, from the clip's first one on [ours]
    frames: CropFrames = 9
    #: side of a crop in pixels, a multiple of 8, at most the stored clips' [ours]
    side: int = Field(default=128, ge=16, multiple_of=8)
    #: share of samples decoded from the student's latent in the place of z^HR; 0: no student is needed [ours]
    student_fraction: float = Field(default=0.5, ge=0, le=1)
    #: λ_1 [ours]
    l1_weight: float = Field(default=0.1, ge=0)
    #: λ_full, of the distance to what the VAE decodes from the same latent; 0: the VAE's decoder is not needed [ours]
    full_decoder_weight: float = Field(default=0.0, ge=0)
    #: L_P: gradients at several sizes, or LPIPS (its weights have to be there: docs/evaluation.md) [ours]
    perceptual: Literal["gradient", "lpips"] = "gradient"
    #: λ_P [ours]
    perceptual_weight: float = Field(default=0.05, ge=0)
    #: sizes at which gradients are compared, each half the one before [ours]
    gradient_scales: int = Field(default=3, ge=1)
    #: λ_grid, of squares of 8 px in what is decoded; 0: not looked at [ours]
    grid_weight: float = Field(default=0.0, ge=0)
    #: λ_adv; 0: no discriminator [ours]
    adversarial_weight: float = Field(default=0.0, ge=0)
    #: step from which the decoder follows the discriminator, which learns from the first one on [ours]
    adversarial_from_step: int = Field(default=0, ge=0)
    #: hinge; softplus; relativistic, as in Stage II [ours]
    gan_loss: GanLoss = "hinge"
    #: weight of the approximate R1 penalty, mean‖D(x) − D(x + σ·ε)‖² on the truth, in L_D; 0: none [peer: 100 in APT]
    r1_weight: float = Field(default=0.0, ge=0)
    #: weight of the same on what was decoded, approximate R2 [peer]
    r2_weight: float = Field(default=0.0, ge=0)
    #: σ of both penalties, in pixels of [-1, 1] [ours]
    perturbation_sigma: float = Field(default=0.01, gt=0)
    discriminator: HeadConfig = HeadConfig(hidden_channels=64)  # [ours]
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, betas=(0.0, 0.99))  # [ours]
    optimizer: OptimizerConfig = OPTIMIZER  # [ours]
    #: of the student where it descends L along with the decoder, for a few hundred steps (SwiftVR's last stage); null:
    #: it is frozen
    student_optimizer: OptimizerConfig | None = None
    #: peak learning rate of the linear path: hundreds of its weights move one value together [ours]
    linear_learning_rate: float = Field(default=5e-5, gt=0)
    #: decay per update of the exported weights' EMA [ours]
    ema_decay: float = Field(default=0.998, ge=0, lt=1)

    @model_validator(mode="after")
    def _switches_mean_something(self) -> FastDecoderConfig:
        if self.student_optimizer is not None and not self.with_student:
            raise ValueError("student_optimizer is given and student_fraction is 0: no student is decoded; raise it")
        if (self.r1_weight or self.r2_weight) and not self.adversarial:
            raise ValueError("r1_weight and r2_weight penalise the discriminator: set adversarial_weight above 0")
        return self

    @property
    def with_student(self) -> bool:
        """Whether a student's latents are decoded."""
        return self.student_fraction > 0

    @property
    def with_full_decoder(self) -> bool:
        """Whether the VAE decodes too."""
        return self.full_decoder_weight > 0

    @property
    def with_lpips(self) -> bool:
        """Whether L_P is LPIPS."""
        return self.perceptual == "lpips" and self.perceptual_weight > 0

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.adversarial_weight > 0


class LrEncoderConfig(Section):
    """Numbers of the LR encoder's training, on whole clips."""

    shape: EncoderShape = EncoderShape()
    #: λ_1 [ours]
    l1_weight: float = Field(default=0.1, ge=0)
    optimizer: OptimizerConfig = OPTIMIZER  # [ours]
    #: peak learning rate of the linear path: hundreds of its weights move one value together [ours]
    linear_learning_rate: float = Field(default=5e-5, gt=0)
    #: decay per update of the exported weights' EMA [ours]
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
