"""Toy networks, batches and prompts for the trainer's tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from common.seeding import seeded_noise
from datagen.dataset.loader import Batch
from pipeline.model.sequence_parallel import ALONE, SequenceGroup
from pipeline.model.transformer import VSRTransformer
from trainer.engine.lora import LoRAConfig, add_adapter
from trainer.engine.network import DeepSpeedConfig, OptimizerConfig
from trainer.stages.dual_stream.algorithm import DualStream, DualStreamConfig
from trainer.stages.dual_stream.auxiliary_networks import HeadConfig

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
        "fake_score": OptimizerConfig(learning_rate=1e-3),
        "heads_learning_rate": 3e-3,
        "ema_decay": 0.9,
    }
    return DualStreamConfig(**(values | changes))


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
    engine = engine or DeepSpeedConfig(zero_stage=1, precision="fp32")
    student, real_score = transformer(2, layers), transformer(1, layers)
    student.share_sequence(sequence)
    real_score.share_sequence(sequence)
    # A fake score that has moved away from the real one, or DMD's gradient would be zero.
    fake_score = moved(real_score) if config.needs_fake_score else None
    for name, adapter in (lora or {}).items():
        adapted = {"student": student, "critic": fake_score}[name]
        assert adapted is not None
        add_adapter(adapted, adapter, network=name, seed=seed)
    return DualStream.build(
        config,
        student=student,
        real_score=real_score,
        fake_score=fake_score,
        engines=dict.fromkeys(("student", "critic", "real_score"), engine),
        embed=embed,
        seed=seed,
        device="cpu",
    )


def moved(model: VSRTransformer) -> VSRTransformer:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            parameter += 0.02 * seeded_noise(parameter.shape, name)
    return copied
