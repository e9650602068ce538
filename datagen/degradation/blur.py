"""Blur by a kernel of one kind and size per clip, whose shape walks from frame to frame."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from common.config import Section
from datagen.degradation.kernels import apply_kernel, gaussian_kernels, sinc_kernels
from datagen.degradation.operation import Drawn, Frames, HrShape, Operation, Probability, Range, choose, listed, walk

Kernel = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc"]

#: [peer: Real-ESRGAN and RealBasicVSR]
KERNEL_WEIGHTS: dict[Kernel, float] = {
    "iso": 0.405,
    "aniso": 0.225,
    "generalized_iso": 0.108,
    "generalized_aniso": 0.027,
    "plateau_iso": 0.108,
    "plateau_aniso": 0.027,
    "sinc": 0.1,
}


class BlurConfig(Section):
    """A kernel of one kind and size per clip whose shape walks from frame to frame [peer: RealBasicVSR]."""

    #: share of clips that are blurred
    probability: Probability = 1.0
    #: odd sizes from the first to the second, px
    kernel_sizes: tuple[int, int] = (7, 21)
    #: by kind of kernel: relative weight
    weights: dict[Kernel, float] = Field(default_factory=lambda: dict(KERNEL_WEIGHTS))
    #: standard deviation of the Gaussians along each axis, px
    sigma: Range = (0.2, 3.0)
    #: largest change of sigma per frame, px
    sigma_step: float = 0.02
    #: rotation of anisotropic kernels, rad
    rotation: Range = (-math.pi, math.pi)
    #: largest change of the rotation per frame, rad
    rotation_step: float = 0.314
    #: exponent of generalised Gaussian kernels
    beta_generalized: Range = (0.5, 4.0)
    #: largest change of that exponent per frame
    beta_generalized_step: float = 0.05
    #: exponent of plateau kernels
    beta_plateau: Range = (1.0, 2.0)
    #: largest change of that exponent per frame
    beta_plateau_step: float = 0.1
    #: cut-off of sinc kernels, rad; null = [π/3, π] below 13 px and [π/5, π] from there
    cutoff: Range | None = None
    #: largest change of the cut-off per frame, rad
    cutoff_step: float = 0.0628

    @model_validator(mode="after")
    def _sizes_are_odd(self) -> BlurConfig:
        low, high = self.kernel_sizes
        if not (3 <= low <= high and low % 2 == high % 2 == 1):
            raise ValueError("kernel_sizes must be two odd numbers from 3, low to high")
        return self


class Blur(Operation):
    """Gaussian, generalised, plateau or sinc kernels."""

    name = "blur"
    config = BlurConfig

    def draw(self, config: BlurConfig, shape: HrShape, rng: np.random.Generator) -> Drawn | None:
        if rng.random() >= config.probability:
            return None
        kind = choose(rng, dict(config.weights))
        low, high = config.kernel_sizes
        size = int(rng.choice(np.arange(low, high + 1, 2)))
        drawn: Drawn = {"kind": kind, "size": size}
        if kind == "sinc":
            cutoff = config.cutoff or (np.pi / 3 if size < 13 else np.pi / 5, np.pi)
            return drawn | {"cutoff": listed(walk(rng, cutoff, config.cutoff_step, shape.frames))}
        drawn["sigma_x"] = listed(walk(rng, config.sigma, config.sigma_step, shape.frames))
        if kind.endswith("aniso"):
            drawn["sigma_y"] = listed(walk(rng, config.sigma, config.sigma_step, shape.frames))
            drawn["rotation"] = listed(walk(rng, config.rotation, config.rotation_step, shape.frames))
        if kind.startswith("generalized"):
            drawn["beta"] = listed(walk(rng, config.beta_generalized, config.beta_generalized_step, shape.frames))
        if kind.startswith("plateau"):
            drawn["beta"] = listed(walk(rng, config.beta_plateau, config.beta_plateau_step, shape.frames))
        return drawn

    def apply(self, drawn: Drawn, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
        if drawn["kind"] == "sinc":
            kernels = sinc_kernels(drawn["size"], np.array(drawn["cutoff"]))
        else:
            ones = [1.0] * len(frames)
            kernels = gaussian_kernels(
                drawn["kind"],
                drawn["size"],
                np.array(drawn["sigma_x"]),
                np.array(drawn.get("sigma_y", ones)),
                np.array(drawn.get("rotation", ones)),
                np.array(drawn.get("beta", ones)),
            )
        return [apply_kernel(frame, kernel) for frame, kernel in zip(frames, kernels, strict=True)]

    def describe(self, drawn: Drawn) -> str:
        return super().describe({key: value for key, value in drawn.items() if key != "beta"})
