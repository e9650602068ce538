"""Stage II of the trainer with random weights, as trainer/train.py builds it, and batches for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.seeding import derive_seed, seeded_noise
from datagen.dataset.loader import Batch
from pipeline.model.config import DEFAULT_PROMPT, ModelConfig, TransformerConfig
from pipeline.model.prompts import placeholder_cache
from pipeline.model.transformer import VSRTransformer
from trainer.config import TrainerConfig
from trainer.engine.process_group import World
from trainer.stages.dual_stream.spec import SPEC
from trainer.stages.stage import TrainingStage
from trainer.train import build_stage

#: names of `TrainingStage.train_step` that are compared
COMPARED = ("loss_", "gradient_norm_")
#: a loss may pass through zero; below this size, its deviation counts as absolute
FLOOR = 0.05

Logs = list[dict[str, float]]


def build(transformer: TransformerConfig, config: TrainerConfig, world: World, prompt_tokens: int = 4) -> TrainingStage:
    """Student and score models have weights of their own, so that every term of L_S matters. Collective."""
    return build_stage(
        replace(SPEC, load=_random_transformer),
        config,
        model_config(transformer),
        init=Path("student"),
        teacher=Path("teacher"),
        embed=placeholder_cache(transformer.text_dim, prompt_tokens).embed,
        world=world,
    )


def model_config(transformer: TransformerConfig) -> ModelConfig:
    """The DiT's shape alone: nothing is read from the folders."""
    return ModelConfig(transformer=transformer, vae=Path("none"), prompts=Path("none"))


def _random_transformer(folder: Path | None, model: ModelConfig, seed: int) -> nn.Module:
    torch.manual_seed(derive_seed(seed, str(folder)))
    return VSRTransformer(**model.transformer.model_dump())


def batch(transformer: TransformerConfig, latent: tuple[int, int, int], *name: object) -> Batch:
    """One clip of latents, a function of `name`."""
    shape = (1, transformer.latent_channels, *latent)
    z_hr = seeded_noise(shape, "hr", *name)
    z_lr = z_hr + 0.3 * seeded_noise(shape, "lr", *name)
    return Batch(["-".join(map(str, name))], {"z_hr": z_hr, "z_lr": z_lr}, [{"caption": DEFAULT_PROMPT}])


def run_rounds(stage: TrainingStage, transformer: TransformerConfig, latent: Any, rounds: int = 2) -> Logs:
    """Logs of the first rounds, each update on a clip of its own."""
    return [
        stage.train_step(step, [batch(transformer, latent, step, update) for update in range(stage.batches_per_step)])
        for step in range(rounds)
    ]


def deviation(logs: Logs, reference: Logs) -> float:
    """Largest relative deviation of a loss or gradient norm; NaN where one is not a number."""
    pairs = [
        (mine[name], theirs[name])
        for mine, theirs in zip(logs, reference, strict=True)
        for name in theirs
        if name.startswith(COMPARED)
    ]
    deviations = torch.tensor([abs(mine - theirs) / max(abs(theirs), FLOOR) for mine, theirs in pairs])
    return deviations.max().item()
