"""`--dry-run`: what a run would be, without a GPU, data or weights."""

from __future__ import annotations

import json

import torch

from pipeline.config import ModelConfig, resolved_yaml
from pipeline.transformer import VSRTransformer, tapped_layers
from trainer.config import NETWORKS, StageName, TrainerConfig
from trainer.discriminator import Critic
from trainer.memory import activation_memory, network_memory

#: clips that memory is reckoned for: (frames, height, width), and their latents (T, h, w)
CLIPS = {"21 x 704 x 1280": (6, 88, 160), "21 x 1088 x 1920": (6, 136, 240)}

TRAINED = ("student", "critic", "teacher")  # Stage I's teacher keeps masters, to be copied shard by shard


def describe(stage: StageName, model: ModelConfig, config: TrainerConfig, gpus: int) -> str:
    """The resolved configuration, parameter counts, memory of each GPU and the DeepSpeed configuration."""
    counts = parameter_counts(stage, model, config)
    lines = ["# resolved configuration", resolved_yaml(model=model, trainer=config)]
    lines += ["# parameters"]
    lines += [f"{name:<12} {count / 1e6:12.2f} M" for name, count in counts.items()]
    lines += [
        "",
        f"# memory of each of {gpus} GPUs, GiB (formulas: trainer/memory.py; allocator slack comes on top)",
    ]
    lines += memory_table(stage, model, config, counts, gpus)
    lines += ["", "# DeepSpeed configuration"]
    for name in counts:
        optimizer = _optimizer(stage, config) if name in TRAINED else None
        lines += [f"{name}: {json.dumps(config.engine_of(name).as_deepspeed(optimizer), indent=2)}"]
    return "\n".join(lines)


def parameter_counts(stage: StageName, model: ModelConfig, config: TrainerConfig) -> dict[str, int]:
    """Parameters of each network of the stage, counted on the meta device."""
    with torch.device("meta"):
        transformer = VSRTransformer(**model.transformer.model_dump())
        counts = {name: _count(transformer) for name in NETWORKS[stage]}
        if stage == "dual_stream" and config.dual_stream.gan:
            settings = config.dual_stream
            taps = tapped_layers(model.transformer.num_layers, settings.tap_fractions)
            fake_score = transformer if settings.needs_fake_score else None
            counts["critic"] = _count(
                Critic(
                    fake_score,
                    shape=transformer.config,
                    taps=taps,
                    tapped=settings.tapped,
                    head=settings.head,
                )
            )
    return counts


def memory_table(
    stage: StageName, model: ModelConfig, config: TrainerConfig, counts: dict[str, int], gpus: int
) -> list[str]:
    """One line per network, then totals with activations for the usual clips."""
    lines = [f"{'network':<12} {'weights':>8} {'gradients':>10} {'optimizer':>10} {'EMA':>6} {'total':>8}"]
    static = 0.0
    for name, count in counts.items():
        memory = network_memory(
            count, config.engine_of(name), gpus, trained=name in TRAINED, ema=name == "student"
        )
        static += memory.total
        lines.append(
            f"{name:<12} {memory.weights:8.2f} {memory.gradients:10.2f} {memory.optimizer:10.2f} {memory.ema:6.2f} "
            f"{memory.total:8.2f}"
        )
    lines.append(f"{'static':<12} {'':>8} {'':>10} {'':>10} {'':>6} {static:8.2f}")
    engine, ranks = config.engine_of("student"), config.sequence_parallel
    for clip, latent in CLIPS.items():
        activations = activation_memory(model.transformer, latent, 1, engine, ranks)
        shared = f" on {ranks} GPUs" if ranks > 1 else ""
        together = static + activations
        lines.append(
            f"with one clip of {clip}{shared}: activations {activations:.2f}, together {together:.2f}"
        )
    return lines


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _optimizer(stage: StageName, config: TrainerConfig):  # type: ignore[no-untyped-def]
    return {
        "base": config.base.optimizer,
        "progressive": config.progressive.optimizer,
        "dual_stream": config.dual_stream.student,
        "preference": config.preference.optimizer,
    }[stage]
