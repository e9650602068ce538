"""The specs of both stages: what they are, without importing what they need to run."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from trainer.stages.fast_codec.config import FastDecoderConfig, LrEncoderConfig
from trainer.stages.stage import NetworkSpec, ScheduleConfig, StageSpec


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function of this package, imported when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(f"trainer.stages.fast_codec.{module}"), name)(*args, **kwargs)

    return call


FAST_DECODER = StageSpec(
    name="fast_decoder",
    summary="a fast decoder for a model's VAE, which sees LR",
    config=FastDecoderConfig,
    networks=(
        NetworkSpec("fast_decoder", optimizer="optimizer", ema=True, load=_later("networks", "load_fast_decoder")),
        NetworkSpec("student", optimizer="student_optimizer", ema=True, trains_predictor=True, needed="with_student"),
        NetworkSpec("full_decoder", needed="with_full_decoder", load=_later("networks", "load_full_decoder")),
        NetworkSpec("perceptual", needed="with_lpips", load=_later("networks", "load_perceptual")),
        NetworkSpec(
            "discriminator",
            optimizer="discriminator_optimizer",
            needed="adversarial",
            load=_later("networks", "load_discriminator"),
        ),
    ),
    build=_later("decoder", "FastDecoderStage"),
    schedule=ScheduleConfig(steps=50_000, learning_rate_schedule="cosine"),  # [ours]
    init="the model folder that it is added to, whose transformer is the student",
    members=("latents", "lr", "hr"),
    pixels=True,
    assemble=_later("networks", "assemble"),
    export=_later("networks", "export"),
    activation_bytes=_later("decoder", "activation_bytes"),
)

LR_ENCODER = StageSpec(
    name="lr_encoder",
    summary="an encoder from LR pixels to z_LR",
    config=LrEncoderConfig,
    networks=(NetworkSpec("lr_encoder", optimizer="optimizer", ema=True, load=_later("networks", "load_lr_encoder")),),
    build=_later("encoder", "LrEncoderStage"),
    schedule=ScheduleConfig(steps=20_000, learning_rate_schedule="cosine", keep_best="latent_mse"),  # [ours]
    init="the model folder that it is added to",
    members=("latents", "lr"),
    target="z_lr",
    export=_later("networks", "export"),
    activation_bytes=_later("encoder", "activation_bytes"),
)
