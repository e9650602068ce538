"""Degradation recipes: the ranges every draw comes from, as typed configuration.

The defaults are RealBasicVSR's second-order degradation with a random walk of every parameter from frame to frame
[peer: RealBasicVSR, arXiv 2111.12704, and its mmagic configuration]. `Recipe()` is the preset `realbasicvsr`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from common.config import Section
from common.errors import UserError


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"a range runs from low to high, not from {value[0]} to {value[1]}")
    return value


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Probability = Annotated[float, Field(ge=0, le=1)]
Kernel = Literal[
    "iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc"
]
Interpolation = Literal["bilinear", "area", "bicubic"]
Codec = Literal["libx264", "mpeg4"]

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
#: RealBasicVSR draws from libx264, h264 and mpeg4; ffmpeg's h264 encoder is libx264
CODEC_WEIGHTS: dict[Codec, float] = {"libx264": 2 / 3, "mpeg4": 1 / 3}


class SharpenRecipe(Section):
    """Unsharp mask of the HR clip before it is degraded."""

    kernel_size: int = Field(default=51, ge=9)
    weight: float = 0.5
    #: difference from the blurred picture, 0...255, above which a pixel counts as structure
    threshold: float = 10.0


class BlurRecipe(Section):
    """A kernel of one kind and size per clip whose shape walks from frame to frame."""

    probability: Probability = 1.0
    #: odd sizes from the first to the second, px
    kernel_sizes: tuple[int, int] = (7, 21)
    weights: dict[Kernel, float] = Field(default_factory=lambda: dict(KERNEL_WEIGHTS))
    sigma: Range = (0.2, 3.0)
    sigma_step: float = 0.02
    rotation: Range = (-math.pi, math.pi)
    rotation_step: float = 0.314
    beta_generalized: Range = (0.5, 4.0)
    beta_generalized_step: float = 0.05
    beta_plateau: Range = (1.0, 2.0)
    beta_plateau_step: float = 0.1
    #: cut-off of sinc kernels, rad; null = [π/3, π] below 13 px and [π/5, π] from there
    cutoff: Range | None = None
    cutoff_step: float = 0.0628

    @model_validator(mode="after")
    def _sizes_are_odd(self) -> BlurRecipe:
        low, high = self.kernel_sizes
        if not (3 <= low <= high and low % 2 == high % 2 == 1):
            raise ValueError("kernel_sizes must be two odd numbers from 3, low to high")
        return self


class ResizeRecipe(Section):
    """One of up, down, keep per clip; the factor walks from frame to frame."""

    up: Probability = 0.2
    down: Probability = 0.7
    keep: Probability = 0.1
    factor: Range = (0.15, 1.5)
    factor_step: float = 0.015
    interpolations: tuple[Interpolation, ...] = ("bilinear", "area", "bicubic")


class NoiseRecipe(Section):
    """Gaussian or Poisson noise per clip, on all channels alike (grey) or on each."""

    gaussian: Probability = 0.5
    #: standard deviation, 0...255
    sigma: Range = (1.0, 30.0)
    sigma_step: float = 0.1
    #: factor of BasicSR's Poisson noise (mmagic's is 16 times weaker by a missing division by 255)
    poisson_scale: Range = (0.05, 3.0)
    poisson_scale_step: float = 0.005
    grey: Probability = 0.4


class JpegRecipe(Section):
    """JPEG at a quality that walks from frame to frame."""

    quality: Range = (30, 95)
    quality_step: float = 3.0


class CodecRecipe(Section):
    """A video codec over the whole clip."""

    weights: dict[Codec, float] = Field(default_factory=lambda: dict(CODEC_WEIGHTS))
    #: at an HR clip of 256 x 256 px; scaled with the pixels of the HR clip
    bits_per_frame: Range = (1e4, 1e5)
    #: x264's preset. RealBasicVSR runs `medium`; `superfast` is within 0.2 dB of it at the same bits, and six times
    #: as fast without arithmetic coding (benchmarks/degrade.py) [ours]
    preset: str = "superfast"


class StageRecipe(Section):
    """Blur, resize, noise, JPEG, in this order."""

    blur: BlurRecipe = BlurRecipe()
    resize: ResizeRecipe = ResizeRecipe()
    noise: NoiseRecipe = NoiseRecipe()
    jpeg: JpegRecipe = JpegRecipe()


def _second_stage() -> StageRecipe:
    return StageRecipe(
        blur=BlurRecipe(probability=0.8, sigma=(0.2, 1.5)),
        resize=ResizeRecipe(up=0.3, down=0.4, keep=0.3, factor=(0.3, 1.2), factor_step=0.03),
        noise=NoiseRecipe(sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5)),
    )


class Recipe(Section):
    """Sharpen, first stage, codec, second stage, then in random order {codec} and {resize to LR, sinc}."""

    sharpen: SharpenRecipe | None = SharpenRecipe()
    first: StageRecipe = StageRecipe()
    second: StageRecipe = Field(default_factory=_second_stage)
    codec: CodecRecipe = CodecRecipe()
    #: the last filter, [π/3, π] whatever its size
    final_sinc: BlurRecipe = BlurRecipe(probability=0.8, weights={"sinc": 1.0}, cutoff=(math.pi / 3, math.pi))

    @model_validator(mode="after")
    def _weights_sum_to_something(self) -> Recipe:
        tables = (
            self.first.blur.weights,
            self.second.blur.weights,
            self.final_sinc.weights,
            self.codec.weights,
        )
        for weights in tables:
            if sum(weights.values()) <= 0 or min(weights.values()) < 0:  # type: ignore[attr-defined]
                raise ValueError("weights must be positive numbers")
        return self


def mild() -> Recipe:
    """Less of everything that destroys: noise to 15, JPEG from 60, resize from 0.3 [peer]."""

    def milder(stage: StageRecipe) -> StageRecipe:
        return stage.model_copy(
            update={
                "noise": stage.noise.model_copy(update={"sigma": (1.0, 15.0), "poisson_scale": (0.05, 1.5)}),
                "jpeg": stage.jpeg.model_copy(update={"quality": (60, 95)}),
                "resize": stage.resize.model_copy(update={"factor": (0.3, stage.resize.factor[1])}),
            }
        )

    recipe = Recipe()
    return recipe.model_copy(update={"first": milder(recipe.first), "second": milder(recipe.second)})


def static() -> Recipe:
    """The same ranges without the walk, but for JPEG quality: every frame of a clip is degraded alike."""

    def still(blur: BlurRecipe) -> BlurRecipe:
        steps = ("sigma_step", "rotation_step", "beta_generalized_step", "beta_plateau_step", "cutoff_step")
        return blur.model_copy(update=dict.fromkeys(steps, 0.0))

    def still_stage(stage: StageRecipe) -> StageRecipe:
        return stage.model_copy(
            update={
                "blur": still(stage.blur),
                "resize": stage.resize.model_copy(update={"factor_step": 0.0}),
                "noise": stage.noise.model_copy(update={"sigma_step": 0.0, "poisson_scale_step": 0.0}),
            }
        )

    recipe = Recipe()
    return recipe.model_copy(
        update={
            "first": still_stage(recipe.first),
            "second": still_stage(recipe.second),
            "final_sinc": still(recipe.final_sinc),
        }
    )


PRESETS = {"realbasicvsr": Recipe, "mild": mild, "static": static}


class Mixture(Section):
    """Recipes with weights; each clip draws one. `recipes` adds named ones of your own to the presets."""

    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=lambda: {"realbasicvsr": 1.0})
    recipes: dict[str, Recipe] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_known(self) -> Mixture:
        for name in self.weights:
            if name not in self.recipes and name not in PRESETS:
                raise ValueError(f"unknown recipe {name!r}; known: {', '.join([*PRESETS, *self.recipes])}")
        if not self.weights:
            raise ValueError("weights must name at least one recipe")
        return self

    def recipe(self, name: str) -> Recipe:
        """The recipe called `name`; one of your own hides a preset of the same name."""
        return self.recipes[name] if name in self.recipes else PRESETS[name]()


def mixture(name: str) -> Mixture:
    """What `--preset` names: a preset alone, or `mixture`, the one the tiny preset trains with.

    Raises:
        UserError: an unknown name.
    """
    if name == "mixture":
        return Mixture(weights={"realbasicvsr": 0.5, "mild": 0.5})
    if name in PRESETS:
        return Mixture(weights={name: 1.0})
    raise UserError(f"unknown degradation preset {name!r}; known: {', '.join([*PRESETS, 'mixture'])}")
