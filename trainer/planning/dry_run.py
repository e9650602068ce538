"""`--dry-run`: what a run would be, without a GPU, data or weights."""

from __future__ import annotations

import json

import torch
from torch import nn

from common.config import resolved_yaml
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import VSRTransformer, tapped_layers
from trainer.config import NETWORKS, StageName, TrainerConfig
from trainer.engine.lora import add_adapter
from trainer.planning.memory import TRAINED, stage_memory
from trainer.stages.dual_stream.auxiliary_networks import Critic

#: clips that memory is reckoned for: (frames, height, width), and their latents (T, h, w)
CLIPS = {"21 x 704 x 1280": (6, 88, 160), "21 x 1088 x 1920": (6, 136, 240)}


def describe(stage: StageName, model: ModelConfig, config: TrainerConfig, gpus: int) -> str:
    """The resolved configuration, parameter counts, memory of each GPU and the DeepSpeed configuration."""
    networks = meta_networks(stage, model, config)
    counts = {name: count_parameters(network) for name, network in networks.items()}
    trained = {
        name: count_parameters(network, trained=True) for name, network in networks.items() if name in TRAINED
    }
    lines = ["# resolved configuration", resolved_yaml(model=model, trainer=config)]
    lines += ["# parameters"]
    for name, count in counts.items():
        learning = (
            f", of which {trained[name] / 1e6:.2f} M learn" if trained.get(name, count) != count else ""
        )
        lines += [f"{name:<12} {count / 1e6:12.2f} M{learning}"]
    lines += [
        "",
        f"# memory of each of {gpus} GPUs, GiB (formulas: trainer/planning/memory.py; allocator slack comes on top)",
    ]
    lines += memory_table(stage, model, config, counts, gpus, trained)
    lines += ["", "# DeepSpeed configuration"]
    for name in counts:
        optimizer = _optimizer(stage, config) if name in TRAINED else None
        lines += [f"{name}: {json.dumps(config.engine_of(name).as_deepspeed(optimizer), indent=2)}"]
    return "\n".join(lines)


def parameter_counts(stage: StageName, model: ModelConfig, config: TrainerConfig) -> dict[str, int]:
    """Parameters of each network of the stage."""
    return {name: count_parameters(network) for name, network in meta_networks(stage, model, config).items()}


def meta_networks(stage: StageName, model: ModelConfig, config: TrainerConfig) -> dict[str, nn.Module]:
    """The modules of the stage on the meta device, with adapters and heads; what learns asks for a gradient.

    Raises:
        UserError: an adapter names modules that are not there.
    """
    networks: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for name in NETWORKS[stage]:
            transformer = VSRTransformer(**model.transformer.model_dump())
            if (adapter := config.lora_of(name)) is not None:
                add_adapter(transformer, adapter, network=name, seed=config.seed)
            networks[name] = transformer
        if stage == "dual_stream" and config.dual_stream.gan:
            settings = config.dual_stream
            networks["critic"] = Critic(
                networks["critic"] if settings.needs_fake_score else None,
                shape=networks["real_score"].config,
                taps=tapped_layers(model.transformer.num_layers, settings.tap_fractions),
                tapped=settings.tapped,
                head=settings.head,
            )
    return networks


def memory_table(
    stage: StageName,
    model: ModelConfig,
    config: TrainerConfig,
    counts: dict[str, int],
    gpus: int,
    trained: dict[str, int],
) -> list[str]:
    """One line per network, then totals with activations for the usual clips.

    Args:
        trained: how many of the parameters learn, of the networks that have an optimizer.
    """
    found = {
        clip: stage_memory(stage, model, config, gpus, latent, 1, counts, trained)
        for clip, latent in CLIPS.items()
    }
    first = next(iter(found.values()))
    lines = [
        f"{'network':<12} {'weights':>8} {'gradients':>10} {'optimizer':>10} {'EMA':>6} {'total':>8} {'passing':>8}"
    ]
    for name, memory in first.networks.items():
        lines.append(
            f"{name:<12} {memory.weights:8.2f} {memory.gradients:10.2f} {memory.optimizer:10.2f} {memory.ema:6.2f} "
            f"{memory.total:8.2f} {memory.passing:8.2f}"
        )
    lines.append(f"{'static':<12} {'':>8} {'':>10} {'':>10} {'':>6} {first.static:8.2f}")
    lines.append(f"buckets and gathered parameters {first.buffers:.2f}")
    shared = f" on {config.sequence_parallel} GPUs" if config.sequence_parallel > 1 else ""
    for clip, stage_found in found.items():
        activations, together = f"{stage_found.activations:.2f}", f"{stage_found.peak:.2f}"
        lines.append(f"with one clip of {clip}{shared}: activations {activations}, together {together}")
    return lines


def count_parameters(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _optimizer(stage: StageName, config: TrainerConfig):  # type: ignore[no-untyped-def]
    return {
        "base": config.base.optimizer,
        "progressive": config.progressive.optimizer,
        "dual_stream": config.dual_stream.student,
        "preference": config.preference.optimizer,
    }[stage]
