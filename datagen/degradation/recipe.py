"""Degradation recipes: which operations, in which order, from which ranges.

The defaults are RealBasicVSR's second-order degradation with a random walk of every parameter from frame to frame
[peer: RealBasicVSR, arXiv 2111.12704, and its mmagic configuration]. `Recipe()` is the preset `realbasicvsr`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config import Section
from common.errors import UserError
from datagen.degradation.blur import BlurConfig
from datagen.degradation.jpeg import JpegConfig
from datagen.degradation.noise import NoiseConfig
from datagen.degradation.registry import find_operation
from datagen.degradation.resize import ResizeConfig
from datagen.degradation.sharpen import SharpenConfig
from datagen.degradation.video_compression import CodecConfig


class StageRecipe(Section):
    """Blur, resize, noise, JPEG, in this order."""

    blur: BlurConfig = BlurConfig()
    resize: ResizeConfig = ResizeConfig()
    noise: NoiseConfig = NoiseConfig()
    jpeg: JpegConfig = JpegConfig()


def _second_stage() -> StageRecipe:
    return StageRecipe(
        blur=BlurConfig(probability=0.8, sigma=(0.2, 1.5)),
        resize=ResizeConfig(up=0.3, down=0.4, keep=0.3, factor=(0.3, 1.2), factor_step=0.03),
        noise=NoiseConfig(sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5)),
    )


class ExtraOperation(Section):
    """An operation from outside the repository (docs/extending.md)."""

    #: package.module:Class, a subclass of datagen.degradation.operation.Operation
    operation: str
    #: what it comes after; `last`: everything, so its frames have the LR clip's size
    after: Literal["sharpen", "first", "codec", "second", "last"] = "first"
    #: its own configuration
    config: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _its_configuration_is_valid(self) -> ExtraOperation:
        self.section()
        return self

    def section(self) -> Section:
        """`config`, validated by the operation's class."""
        return find_operation(self.operation).config.model_validate(self.config)


class Recipe(Section):
    """Sharpen, first stage, codec, second stage, then in random order {codec} and {resize to LR, sinc}."""

    sharpen: SharpenConfig | None = SharpenConfig()
    first: StageRecipe = StageRecipe()
    second: StageRecipe = Field(default_factory=_second_stage)
    codec: CodecConfig = CodecConfig()
    #: the last filter, [π/3, π] whatever its size
    final_sinc: BlurConfig = BlurConfig(probability=0.8, weights={"sinc": 1.0}, cutoff=(math.pi / 3, math.pi))

    #: operations of your own, drawn apart from the others, whose draws stay as they are
    extra: tuple[ExtraOperation, ...] = ()

    @model_validator(mode="after")
    def _weights_sum_to_something(self) -> Recipe:
        tables = (self.first.blur.weights, self.second.blur.weights, self.final_sinc.weights, self.codec.weights)
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


def light() -> Recipe:
    """A web video: a slight blur in half of the clips, little noise, one resize, a fair bitrate [ours].

    Small models restore detail behind this recipe; behind `mild` nothing recognisable is left to restore. The resize
    is by area: OpenCV's bilinear and bicubic do not filter before they shrink, and by 4 they leave stairs that no
    video player and no camera makes.
    """
    first = StageRecipe(
        blur=BlurConfig(probability=0.5, sigma=(0.2, 1.2)),
        resize=ResizeConfig(up=0.0, down=0.0, keep=1.0, factor=(1.0, 1.0), factor_step=0.0, interpolations=("area",)),
        noise=NoiseConfig(sigma=(0.5, 5.0), poisson_scale=(0.05, 0.3)),
        jpeg=JpegConfig(quality=(75, 95)),
    )
    second = first.model_copy(
        update={
            "blur": first.blur.model_copy(update={"probability": 0.0}),
            "noise": first.noise.model_copy(update={"sigma": (0.5, 2.0), "poisson_scale": (0.05, 0.1)}),
        }
    )
    return Recipe(
        sharpen=None,
        first=first,
        second=second,
        codec=CodecConfig(bits_per_frame=(5e4, 2e5)),
        final_sinc=BlurConfig(probability=0.0, weights={"sinc": 1.0}),
    )


def static() -> Recipe:
    """The same ranges without the walk, but for JPEG quality: every frame of a clip is degraded alike."""

    def still(blur: BlurConfig) -> BlurConfig:
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


PRESETS = {"realbasicvsr": Recipe, "mild": mild, "light": light, "static": static}


class Mixture(Section):
    """Recipes with weights; each clip draws one. `recipes` adds named ones of your own to the presets."""

    #: by recipe name, the built-in realbasicvsr, mild, light, static or one of `recipes`: relative weight
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=lambda: {"realbasicvsr": 1.0})
    #: recipes of your own by name: sharpen, first stage, codec, second stage, then in random order {codec} and
    #: {resize to LR, sinc}
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
