"""Toy networks, batches and prompts for the trainer's tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.seeding import seeded_noise
from datagen.dataset.loader import Batch
from pipeline.model.sequence_parallel import ALONE, SequenceGroup
from pipeline.model.transformer import VSRTransformer
from trainer.engine.config import DeepSpeedConfig, LoRAConfig, OptimizerConfig
from trainer.engine.lora import add_adapter
from trainer.stages.dual_stream.algorithm import DualStream
from trainer.stages.dual_stream.config import DualStreamConfig, HeadConfig
from trainer.stages.dual_stream.spec import SPEC
from trainer.stages.stage import NetworkSpec, StageSetup, StageSpec

LATENT = (4, 2, 4, 6)  # C, T, H, W


def transformer(seed: int, layers: int = 3) -> VSRTransformer:
    """Width 48; every parameter random, also those that start at zero in a real model."""
    torch.manual_seed(seed)
    model = VSRTransformer(
        latent_channels=LATENT[0],
        num_attention_heads=4,
        attention_head_dim=12,
        text_dim=8,
        freq_dim=16,
        ffn_dim=96,
        num_layers=layers,
    )
    return model.eval()


def embed(captions: list[str]) -> torch.Tensor:
    return torch.stack([seeded_noise((4, 8), caption) for caption in captions])


def batch(keys: Sequence[str]) -> Batch:
    z_hr = torch.stack([seeded_noise(LATENT, key, "hr") for key in keys])
    z_lr = z_hr + 0.3 * torch.stack([seeded_noise(LATENT, key, "lr") for key in keys])
    return Batch(list(keys), {"z_hr": z_hr, "z_lr": z_lr}, [{"caption": "a film"} for _ in keys])


def global_batches(step: int, updates: int, size: int) -> list[list[str]]:
    """Keys of each update's global batch."""
    return [[f"{step}-{update}-{index}" for index in range(size)] for update in range(updates)]


def local_batches(keys: list[list[str]], rank: int, ranks: int, accumulation: int) -> list[Batch]:
    """This rank's micro-batches, in the order `train_step` expects."""
    batches = []
    for update in keys:
        share = len(update) // (ranks * accumulation)
        for micro in range(accumulation):
            start = (micro * ranks + rank) * share
            batches.append(batch(update[start : start + share]))
    return batches


def configuration(**changes: object) -> DualStreamConfig:
    """Weights and rates at which every term of the toy's L_S matters within a few rounds."""
    values: dict[str, object] = {
        "gan_weight": 0.5,
        "feature_matching_weight": 0.3,
        "head": HeadConfig(hidden_channels=8),
        "student": OptimizerConfig(learning_rate=1e-3, gradient_clip=0.05),
        "fake_score": OptimizerConfig(learning_rate=1e-3, gradient_clip=0.1),
        "heads_learning_rate": 3e-3,
        "heads_gradient_clip": 0.02,
        "ema_decay": 0.9,
        "time_shift": 5.0,
    }
    return DualStreamConfig(**(values | changes))


def setup(
    spec: StageSpec,
    config: Any,
    transformers: dict[str, VSRTransformer],
    *,
    engine: DeepSpeedConfig | None = None,
    sequence: SequenceGroup = ALONE,
    lora: dict[str, LoRAConfig] | None = None,
    seed: int = 5,
    keep_model: Callable[[str, dict[str, torch.Tensor]], None] | None = None,
) -> StageSetup:
    """What a stage is built from; a network whose transformer is not given has a copy of the student's.

    Args:
        lora: adapters by network name: student, critic.
    """
    engine = engine or DeepSpeedConfig(zero_stage=1, precision="fp32")

    def transformer_of(network: NetworkSpec) -> VSRTransformer:
        module = copy.deepcopy(transformers.get(network.name, transformers["student"]))
        module.share_sequence(sequence)
        if network.lora is not None and lora is not None and network.lora in lora:
            add_adapter(module, lora[network.lora], network=network.lora, seed=seed)
        return module

    modules = spec.modules(config, transformer_of, seed)
    return StageSetup(
        spec, config, modules, engine_of=lambda name: engine, embed=embed, seed=seed, keep_model=keep_model
    )


def dual_stream(
    config: DualStreamConfig,
    engine: DeepSpeedConfig | None = None,
    layers: int = 3,
    seed: int = 7,
    sequence: SequenceGroup = ALONE,
    lora: dict[str, LoRAConfig] | None = None,
) -> DualStream:
    """
    Args:
        lora: adapters by network name: student, critic.
    """
    student, real_score = transformer(2, layers), transformer(1, layers)
    # A fake score that has moved away from the real one, or DMD's gradient would be zero.
    transformers = {"student": student, "critic": moved(real_score), "real_score": real_score}
    return DualStream(setup(SPEC, config, transformers, engine=engine, sequence=sequence, lora=lora, seed=seed))


def moved(model: VSRTransformer) -> VSRTransformer:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            parameter += 0.02 * seeded_noise(parameter.shape, name)
    return copied
