"""Every number of Stage II with its source; the code that uses them is trainer/stages/dual_stream/algorithm.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from common.config import Section
from trainer.engine.config import OptimizerConfig

#: hinge [paper]; softplus: non-saturating logistic [peer: DMD2]; relativistic: paired logistic [peer: R3GAN]
GanLoss = Literal["hinge", "softplus", "relativistic"]
#: which score models the discriminator looks through; both is RFS-GAN [paper, Tab. 5]
Tapped = Literal["both", "real", "fake"]


class HeadConfig(Section):
    """Shape of one convolutional head; the paper says only that they are convolutional."""

    #: channels of the hidden convolutions [ours]
    hidden_channels: int = Field(default=256, ge=1)
    #: odd kernel over (time, height, width) of the token grid; 1 in time: the causal VAE has few latent frames [ours]
    kernel_size: tuple[int, int, int] = (1, 3, 3)
    #: hidden convolutions with that kernel [ours]
    layers: int = Field(default=2, ge=1)


class DualStreamConfig(Section):
    """All numbers of Stage II. The paper's ablations are settings of these fields (configs/ablations/)."""

    #: N: auxiliary updates before each student update [paper]
    auxiliary_updates: int = Field(default=3, ge=1)
    #: λ_DMD; 0 is the ablation "RFS-GAN only" [note]
    dmd_weight: float = Field(default=1.0, ge=0)
    #: λ_GAN; 0 together with λ_FM is the ablation "DMD only" [note]
    gan_weight: float = Field(default=0.1, ge=0)
    #: λ_FM [note]
    feature_matching_weight: float = Field(default=0.05, ge=0)
    #: features that L_FM compares: normalised per token as the heads see them, or raw, of which a few large channels
    #: decide [ours]
    feature_matching: Literal["normalised", "raw"] = "normalised"
    #: joint [paper]; sequential: DMD alone for `sequential_dmd_steps`, then GAN and FM alone (ablation)
    schedule: Literal["joint", "sequential"] = "joint"
    #: steps of DMD alone, only for schedule: sequential
    sequential_dmd_steps: int = Field(default=0, ge=0)
    #: first steps in which the heads are updated but the student does not use them yet (λ_GAN = λ_FM = 0); without DMD
    #: it waits for them [ours]
    heads_warmup_steps: int = Field(default=0, ge=0)

    #: hinge, the default [paper]; softplus: non-saturating logistic as in DMD2; relativistic: paired as in R3GAN
    gan_loss: GanLoss = "hinge"
    #: weight of the approximate R1 penalty, mean‖D(x) − D(x + σ·ε)‖² on the data, in L_D; 0 = none. R3GAN's
    #: relativistic loss converges by R1 and R2 [peer: 100 in APT]
    r1_weight: float = Field(default=0.0, ge=0)
    #: weight of the same on the student's samples, approximate R2 [peer]
    r2_weight: float = Field(default=0.0, ge=0)
    #: σ of both penalties, in latent units [peer: 0.01 in APT]
    perturbation_sigma: float = Field(default=0.01, gt=0)
    #: tapped layers as fractions of the depth: 9, 18, 27 of 30 [paper]
    tap_fractions: tuple[float, ...] = (0.3, 0.6, 0.9)
    #: score models that are the discriminator's backbones; both is RFS-GAN [paper, Tab. 5]
    tapped: Tapped = "both"
    head: HeadConfig = HeadConfig()
    #: noised [paper]; clean is the SeedVR2 way: unstable, grid artefacts, two forwards more (ablation)
    discriminator_input: Literal["noised", "clean"] = "noised"
    #: S and HR are diffused with the same ε [ours]: else feature matching compares noise
    shared_noise: bool = True

    #: w of v(c) + w·(v(c) − v(∅)) for θ_R; 0: θ_R is the CFG-distilled teacher and takes one forward [paper]
    real_score_guidance: float = Field(default=0.0, ge=0)
    #: decoupled DMD: the guidance of `real_score_guidance` is evaluated at a t of its own, drawn like t and clamped to
    #: this range; null = at DMD's t [peer: 2511.22677]
    guidance_time_range: tuple[float, float] | None = None
    #: data forcing: weight of θ_R's error on real data, ẑ0^R(z_t^HR) − z^HR, in DMD's gradient; 0 = none [ours]
    data_forcing_weight: float = Field(default=0.0, ge=0)
    #: step from which data forcing is on; the last 100 to 300 steps are enough [peer: 2606.18478]
    data_forcing_from_step: int = Field(default=0, ge=0)
    #: shift of t ~ U(0, 1); null = model.shift [peer: 5]
    time_shift: float | None = Field(default=None, gt=0)
    #: the shifted t is clamped to it [peer: 0.02…0.98]
    time_range: tuple[float, float] = (0.02, 0.98)

    student: OptimizerConfig = OptimizerConfig(learning_rate=2e-6)  # [peer]
    fake_score: OptimizerConfig = OptimizerConfig(learning_rate=2e-6)  # [peer: 4e-7…2e-6]
    #: peak learning rate of the discriminator heads [peer]
    heads_learning_rate: float = Field(default=1e-5, gt=0)
    #: largest gradient norm of the heads, apart from the fake score's; 0 = no clipping [ours]
    heads_gradient_clip: float = Field(default=1.0, ge=0)
    #: decay per update of the exported weights' EMA [peer]
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    #: steps between two logs of the norms of the DMD, GAN and FM gradients at ẑ0, each λ included: two more backward
    #: passes through the score models in such a step; 0 = never [ours]
    gradient_norms_every: int = Field(default=50, ge=0)
    #: t at which the previews of the two score models look at the student's sample [ours]
    preview_time: float = Field(default=0.5, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> DualStreamConfig:
        for name in ("time_range", "guidance_time_range"):
            if (times := getattr(self, name)) is not None and not 0 < times[0] <= times[1] <= 1:
                raise ValueError(f"{name} must be 0 < low <= high <= 1, not {list(times)}")
        if self.guidance_time_range is not None and not (self.real_score_guidance and self.dmd_weight):
            raise ValueError("guidance_time_range needs real_score_guidance and dmd_weight above 0: set them")
        if self.data_forcing_weight and not self.dmd_weight:
            raise ValueError("data_forcing_weight corrects DMD's gradient: it needs dmd_weight above 0")
        if (self.r1_weight or self.r2_weight) and not self.gan:
            raise ValueError("r1_weight and r2_weight penalise the discriminator: set gan_weight above 0")
        if self.dmd_weight == self.gan_weight == self.feature_matching_weight == 0:
            raise ValueError("all of dmd_weight, gan_weight, feature_matching_weight are 0: there is no loss")
        if self.schedule == "sequential" and not (self.sequential_dmd_steps and self.dmd_weight and self.gan):
            raise ValueError("schedule: sequential needs sequential_dmd_steps and weights for DMD and GAN")
        if self.gan and not self.tap_fractions:
            raise ValueError("tap_fractions is empty: the GAN stream needs tapped layers")
        return self

    @property
    def gan(self) -> bool:
        """Whether there is a GAN stream, hence heads and passes over HR latents."""
        return self.gan_weight > 0 or self.feature_matching_weight > 0

    @property
    def needs_fake_score(self) -> bool:
        """Whether DMD or the discriminator looks at the fake score; if neither does, there is none."""
        return self.dmd_weight > 0 or self.tapped != "real"
