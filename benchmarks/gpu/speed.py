"""The part `speed`: seconds, MFU and memory of the paper's shape with random weights."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from benchmarks.gpu import stage_two
from benchmarks.gpu.sizes import SIZES, Size
from benchmarks.gpu.table import Table
from common.seeding import seeded_noise
from pipeline.model.attention import set_attention
from pipeline.model.load_weights import build_transformer
from pipeline.model.prompts import placeholder_cache
from pipeline.vsr_pipeline import Tiling, VSRPipeline
from trainer.config import TrainerConfig
from trainer.engine.process_group import World
from trainer.monitoring.throughput import Throughput
from trainer.planning.dry_run import count_parameters, meta_networks
from trainer.planning.stage_memory import stage_memory
from trainer.stages.dual_stream.spec import SPEC

GIB = 2**30
#: the three ways to fit one GPU, the fastest first
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2, offloaded optimizer": {"zero_stage": 2, "offload_optimizer": True},
}


def run(table: Table, name: str, world: World) -> None:
    """A round of Stage II by clip and engine, then one clip through the pipeline."""
    size = SIZES[name]
    for latent in size.trained_latents:
        for engine, settings in ENGINES.items():
            row = f"Stage II, {engine}, latent {'x'.join(map(str, latent))}"
            outcome = table.attempt(row, partial(round_speed, size, latent, settings, world))
            if outcome == "measured":
                break  # the slower ways are for what does not fit
    frames, height, width = size.upscaled
    for tile in (None, size.speed_tile):
        row = f"inference of {frames}x{height}x{width}, " + ("undivided" if tile is None else f"VAE tiles of {tile} px")
        if table.attempt(row, partial(inference_speed, size, tile, world)) == "measured":
            break


def round_speed(size: Size, latent: tuple[int, int, int], engine: dict[str, Any], world: World) -> dict[str, Any]:
    """The second round of two: the first one compiles and allocates."""
    config = TrainerConfig.model_validate(
        {"engine": {"precision": "bf16", "activation_checkpointing": True} | engine, "attention": "auto"}
    )
    with peak_memory(world) as peak:
        stage = stage_two.build(size.paper, config, world, prompt_tokens=512)
        stage_two.run_rounds(stage, size.paper, latent, rounds=1)
        synchronise(world)
        began = time.perf_counter()
        stage_two.run_rounds(stage, size.paper, latent, rounds=1)
        synchronise(world)
        seconds = time.perf_counter() - began
    model = stage_two.model_config(size.paper)
    networks = meta_networks(SPEC, model, config)
    counts = {name: count_parameters(module) for name, module in networks.items()}
    trained = {name: count for name, count in counts.items() if SPEC.network(name).optimizer is not None}
    predicted = stage_memory(SPEC, model, config, world.size, latent, 1, counts, trained).peak
    rates = Throughput(stage, global_batch_size=1, devices=1).rates(1, stage_two.batch(size.paper, latent), seconds)
    return {
        "seconds": seconds,
        **{name: rates[name] for name in ("tokens_per_second", "tflops_per_device", "mfu") if name in rates},
        "peak_gib": peak.gib,
        "predicted_gib": predicted,
    }


def inference_speed(size: Size, tile: int | None, world: World) -> dict[str, Any]:
    """One clip, encoded, one evaluation of the DiT, decoded; after a warm-up on a clip of five frames."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(world.device):
        transformer = build_transformer(size.paper).to(dtype)
        vae = AutoencoderKLWan(**size.speed_vae).to(dtype)
    set_attention(transformer, "auto")
    pipeline = VSRPipeline(transformer, vae, placeholder_cache(size.paper.text_dim, 512)).to(world.device)
    frames, height, width = size.upscaled
    low = seeded_noise((frames, height // 4, width // 4, 3), "speed").mul(40).add(128).clamp(0, 255).to(torch.uint8)
    tiling = Tiling(vae_tile_px=tile)
    pipeline(low[:5], num_inference_steps=1, tiling=tiling)
    with peak_memory(world) as peak:
        began = time.perf_counter()
        result = pipeline(low, num_inference_steps=1, tiling=tiling)
        synchronise(world)
        seconds = time.perf_counter() - began
    parts = {f"{name}_seconds": value for name, value in result.seconds.items()}
    return {"seconds": seconds, **parts, "frames_per_second": frames / seconds, "peak_gib": peak.gib}


class peak_memory:
    """GiB that torch allocated at most inside; None on a CPU."""

    def __init__(self, world: World) -> None:
        self._device = world.device
        self.gib: float | None = None

    def __enter__(self) -> peak_memory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self.gib = torch.cuda.max_memory_allocated() / GIB


def synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
