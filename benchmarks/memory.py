"""Measured memory beside the formulas of trainer/planning/memory.py.

    python benchmarks/memory.py                            # any machine: a small network, every stage
    python benchmarks/memory.py --stage dual_stream --config configs/wan-1.3b.yaml --latent 6 88 160    # a GPU

On a CPU every tensor's storage is counted from its making to its end (`LiveBytes`), the autograd graph's included. That
is what torch.cuda.max_memory_allocated says on a GPU. What an allocator reserves beyond that comes on top.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
from pathlib import Path
from typing import Any

import torch

# DeepSpeed looks for an accelerator on import; a machine without one is a CPU machine, not an error.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from common.config import load_section
from common.errors import run_command
from common.live_bytes import LiveBytes
from datagen.dataset.loader import Batch
from pipeline.model.attention import set_attention
from pipeline.model.config import ModelConfig, TransformerConfig
from pipeline.model.transformer import VSRTransformer
from trainer.config import TrainerConfig
from trainer.engine.config import DeepSpeedConfig, OptimizerConfig
from trainer.engine.network import Network
from trainer.engine.process_group import World, start_distributed
from trainer.planning.dry_run import count_parameters, meta_networks
from trainer.planning.memory import GIB
from trainer.planning.stage_memory import StageMemory, stage_memory
from trainer.stages import STAGES
from trainer.stages.dual_stream.config import DualStreamConfig, HeadConfig
from trainer.stages.stage import NetworkSpec, StageSetup, StageSpec, TrainingStage

SMALL_BUCKET = 10_000
PROMPT_TOKENS = 4
SMALL = TransformerConfig(
    num_layers=6,
    num_attention_heads=2,
    attention_head_dim=64,
    ffn_dim=768,
    freq_dim=32,
    text_dim=32,
    latent_channels=16,
)


def held_by_a_block(
    shape: TransformerConfig, latent: tuple[int, int, int], precision: str, *, trainable: bool, checkpointing: bool
) -> float:
    """Bytes that one more block holds from forward to backward."""
    return (
        _held(shape, latent, precision, trainable, checkpointing, 3)
        - _held(shape, latent, precision, trainable, checkpointing, 1)
    ) / 2


def _held(
    shape: TransformerConfig, latent: Any, precision: str, trainable: bool, checkpointing: bool, layers: int
) -> int:
    model = VSRTransformer(**(shape.model_dump() | {"num_layers": layers})).requires_grad_(trainable)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if checkpointing:
        model.enable_gradient_checkpointing()
    z = torch.zeros(1, shape.latent_channels, *latent)
    prompt = torch.zeros(1, PROMPT_TOKENS, shape.text_dim)
    with LiveBytes() as live:
        out = model(z.clone().requires_grad_(), torch.ones(1), z, prompt)
        held = live.now
    del out
    return held


def network_bytes(zero_stage: int, precision: str, *, bucket_size: int = SMALL_BUCKET) -> dict[str, float]:
    """Bytes per parameter of a trained network with EMA: always there, and at most during an update."""
    gc.collect()
    with LiveBytes() as live:
        module = VSRTransformer(**SMALL.model_dump())
        tables = sum(buffer.nbytes for buffer in module.buffers())
        engine = DeepSpeedConfig(
            zero_stage=zero_stage, precision=precision, bucket_size=bucket_size, persistence_threshold=0
        )  # type: ignore[arg-type]
        network = Network(
            "student", module, deepspeed=engine, optimizer=OptimizerConfig(learning_rate=1e-4), ema_decay=0.9
        )
        z = torch.zeros(1, SMALL.latent_channels, 1, 4, 4)
        prompt = torch.zeros(1, PROMPT_TOKENS, SMALL.text_dim)
        for _ in range(2):  # the first one allocates the moments
            live.peak = live.now
            with network.updating():
                network.backward(network(z, torch.ones(1), z, prompt).velocity.square().mean())
                network.step()
            gc.collect()
    count = network.parameter_count
    return {"always": (live.now - tables) / count, "peak": (live.peak - tables) / count}


def build_stage(stage: StageSpec, model: ModelConfig, config: TrainerConfig, device: torch.device) -> TrainingStage:
    """Random weights in real engines."""

    def transformer_of(network: NetworkSpec) -> VSRTransformer:
        transformer = VSRTransformer(**model.transformer.model_dump())
        set_attention(transformer, config.attention, config.engine_of("student").dtype)
        return transformer

    width = model.transformer.text_dim
    setup = StageSetup(
        stage,
        config.section_of(stage),
        stage.modules(config.section_of(stage), transformer_of, config.seed),
        engine_of=config.engine_of,
        embed=lambda captions: torch.zeros(len(captions), PROMPT_TOKENS, width),
        seed=0,
        device=device,
    )
    return stage.build(setup)


def batch_of(stage: StageSpec, model: ModelConfig, latent: tuple[int, int, int], size: int) -> Batch:
    keys = [str(index) for index in range(size)]
    names = ("z_win", "z_lose", "z_lr") if "pair" in stage.members else ("z_hr", "z_lr")
    shape = (size, model.transformer.latent_channels, *latent)
    noises = {"noise_win": ["w"], "noise_lose": ["l"]}
    return Batch(keys, {name: torch.zeros(shape) for name in names}, [{"caption": "", **noises} for _ in keys])


def stage_bytes(
    stage: StageSpec, model: ModelConfig, config: TrainerConfig, world: World, latent: tuple[int, int, int], size: int
) -> tuple[float, float]:
    """(between two steps, at most during one), in GiB, of one rank."""
    gc.collect()
    if world.device.type == "cuda":
        built = build_stage(stage, model, config, world.device)
        batches = [batch_of(stage, model, latent, size)] * built.batches_per_step
        for step in range(2):  # the first one allocates the moments
            torch.cuda.reset_peak_memory_stats()
            built.train_step(step, batches)
        return torch.cuda.memory_allocated() / GIB, torch.cuda.max_memory_allocated() / GIB
    with LiveBytes() as live:
        built = build_stage(stage, model, config, world.device)
        batches = [batch_of(stage, model, latent, size)] * built.batches_per_step
        for step in range(2):
            live.peak = live.now
            built.train_step(step, batches)
            gc.collect()
        modules = [network.module for network in built.networks.values()]
        tables = sum(buffer.nbytes for module in modules for buffer in module.buffers())
    return (live.now - tables) / GIB, (live.peak - tables) / GIB


def predicted(
    stage: StageSpec, model: ModelConfig, config: TrainerConfig, gpus: int, latent: tuple[int, int, int], size: int
) -> StageMemory:
    """What the formulas say."""
    networks = meta_networks(stage, model, config)
    counts = {name: count_parameters(network) for name, network in networks.items()}
    trained = {name: count_parameters(network, trained=True) for name, network in networks.items()}
    return stage_memory(stage, model, config, gpus, latent, size, counts, trained)


def small_configuration(zero_stage: int, checkpointing: bool) -> TrainerConfig:
    engine = {"zero_stage": zero_stage, "activation_checkpointing": checkpointing, "bucket_size": SMALL_BUCKET}
    return TrainerConfig(
        engine=DeepSpeedConfig(**engine),  # type: ignore[arg-type]
        attention="native",
        dual_stream=DualStreamConfig(auxiliary_updates=1, head=HeadConfig(hidden_channels=32)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="preset; without one, a small network")
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--latent", type=int, nargs=3, default=(2, 64, 64), metavar=("T", "H", "W"))
    parser.add_argument("--batch", type=int, default=1, help="clips per micro-batch")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    arguments = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    world = start_distributed()
    latent: tuple[int, int, int] = tuple(arguments.latent)  # type: ignore[assignment]
    settings = []
    if arguments.config:
        model = load_section(arguments.config, "model", ModelConfig, arguments.overrides)
        settings = [load_section(arguments.config, "trainer", TrainerConfig, arguments.overrides)]
    else:
        model = ModelConfig(transformer=SMALL, vae=Path("none"), prompts=Path("none"))
        settings = [small_configuration(2, checkpointing) for checkpointing in (False, True)]
    print(f"{'stage':<12} {'checkpointing':<14} {'MiB between steps':>18} {'formula':>9} {'peak':>9} {'formula':>9}")
    for config in settings:
        for name in arguments.stage:
            stage = STAGES[name]
            always, peak = stage_bytes(stage, model, config, world, latent, arguments.batch)
            formula = predicted(stage, model, config, world.size, latent, arguments.batch)
            checkpointing = str(config.engine_of("student").activation_checkpointing)
            print(
                f"{name:<12} {checkpointing:<14} {always * 1024:>18.1f} {formula.static * 1024:>9.1f} "
                f"{peak * 1024:>9.1f} {formula.peak * 1024:>9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    run_command(main)
