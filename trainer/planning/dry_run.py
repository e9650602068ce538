"""`--dry-run`: what a run would be, without a GPU, data or weights."""

from __future__ import annotations

import json

import torch
from torch import nn

from common.config import resolved_yaml
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import VSRTransformer
from trainer.config import TrainerConfig
from trainer.engine.deepspeed_internals import deepspeed_config
from trainer.engine.lora import add_adapter
from trainer.planning.memory import GIB
from trainer.planning.stage_memory import stage_memory
from trainer.stages.stage import NetworkSpec, StageSpec

#: clips that memory is reckoned for: (frames, height, width), and their latents (T, h, w)
CLIPS = {"21 x 704 x 1280": (6, 88, 160), "21 x 1088 x 1920": (6, 136, 240)}

GPUS_PER_NODE = 8


def describe(stage: StageSpec, model: ModelConfig, config: TrainerConfig, gpus: int) -> str:
    """The resolved configuration, parameter counts, memory of each GPU and the DeepSpeed configuration.

    Raises:
        UserError: the GPUs cannot share the batches; an adapter names modules that are not there.
    """
    config.micro_batch_of(stage, gpus)
    counts, trained = parameters_of(stage, config, meta_networks(stage, model, config))
    lines = ["# resolved configuration", resolved_yaml(model=model, trainer=config)]
    lines += ["# parameters"]
    for name, count in counts.items():
        learning = f", of which {trained[name] / 1e6:.2f} M trainable" if trained.get(name, count) != count else ""
        lines += [f"{name:<12} {count / 1e6:12.2f} M{learning}"]
    lines += [
        "",
        f"# memory of each of {gpus} GPUs, GiB (formulas: trainer/planning/memory.py; allocator slack comes on top)",
    ]
    lines += memory_table(stage, model, config, counts, gpus, trained)
    lines += ["", "# DeepSpeed configuration"]
    for name in counts:
        optimizer = stage.network(name).optimizer_of(config.section_of(stage))
        lines += [f"{name}: {json.dumps(deepspeed_config(config.engine_of(name), optimizer), indent=2)}"]
    return "\n".join(lines)


def meta_networks(stage: StageSpec, model: ModelConfig, config: TrainerConfig) -> dict[str, nn.Module]:
    """The modules of the stage on the meta device, with adapters and heads; what is trained asks for a gradient.

    Raises:
        UserError: an adapter names modules that are not there.
    """

    def transformer_of(network: NetworkSpec) -> nn.Module:
        if network.load is not None:
            return network.load(None, model, config.section_of(stage), config.seed)
        if stage.load is not None:
            return stage.load(None, model, config.seed)
        transformer = VSRTransformer(**model.transformer.model_dump())
        if network.lora is not None and network.lora in config.lora:
            add_adapter(transformer, config.lora[network.lora], network=network.lora, seed=config.seed)
        return transformer

    with torch.device("meta"):
        return stage.modules(config.section_of(stage), transformer_of, config.seed)


def parameters_of(
    stage: StageSpec, config: TrainerConfig, networks: dict[str, nn.Module]
) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters of each network, and of those that have an optimizer how many are trainable."""
    section = config.section_of(stage)
    counts = {name: count_parameters(network) for name, network in networks.items()}
    trained = {
        name: count_parameters(network, trained=True)
        for name, network in networks.items()
        if stage.network(name).optimizer_of(section)
    }
    return counts, trained


def memory_table(
    stage: StageSpec,
    model: ModelConfig,
    config: TrainerConfig,
    counts: dict[str, int],
    gpus: int,
    trained: dict[str, int],
) -> list[str]:
    """One line per network, then totals with activations for the usual clips.

    Args:
        trained: how many of the parameters are trainable, of the networks that have an optimizer.
    """
    found = {
        clip: stage_memory(stage, model, config, gpus, latent, 1, counts, trained) for clip, latent in CLIPS.items()
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
    ranks = min(gpus, GPUS_PER_NODE)
    mapped, own = sum(counts.values()) * 4 / GIB, max(counts.values()) * 4 / GIB
    lines.append(f"host memory while weights are loaded: {mapped:.1f} mapped, which the ranks of a node share;")
    lines.append(
        f"  of bfloat16 files one network in float32: {own:.1f} per rank, {ranks * own:.0f} per node of {ranks}"
    )
    shared = f" on {config.sequence_parallel} GPUs" if config.sequence_parallel > 1 else ""
    for clip, stage_found in found.items():
        activations, peak = f"{stage_found.activations:.2f}", f"{stage_found.peak:.2f}"
        lines.append(f"with one clip of {clip}{shared}: activations {activations}, peak {peak}")
    return lines


def count_parameters(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
