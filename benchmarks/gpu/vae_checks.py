"""Wan's VAE with random weights: its precision on the device, and tiles against the whole clip."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.gpu.sizes import Size
from common.seeding import seeded_noise
from pipeline.model.config import TransformerConfig
from pipeline.model.load_weights import build_transformer
from pipeline.model.prompts import placeholder_cache
from pipeline.model.vae import decode_latents, encode_video
from pipeline.vsr_pipeline import Tiling, VSRPipeline
from trainer.engine.process_group import World

#: float32 against float64, relative L2 error
PRECISION = 1e-3
#: mean absolute difference in grey levels of 255: the attention in the VAE's middle sees one tile at a time
TILES = 3.0
#: of a VAE small enough for float64 on a CPU
SMALL = {"base_dim": 8, "num_res_blocks": 1}


def vae_precision(size: Size, world: World) -> dict[str, float]:
    """Encode a tile and decode it, in float32 and in float64."""
    vae = _small_vae(world)
    side = size.vae_tile[1]
    pixels = seeded_noise((1, 3, 5, side, side), "vae").clamp(-1, 1).to(world.device)

    def outputs() -> tuple[Tensor, Tensor]:
        z = encode_video(vae, pixels)
        return z, decode_latents(vae, z)

    found = outputs()
    vae.to(torch.float64)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, outputs(), strict=True)]
    return {"deviation": max(errors), "limit": PRECISION}


def vae_tiles(size: Size, world: World) -> dict[str, float]:
    """A clip through the pipeline with and without tiles. The DiT returns z_LR, so encoder and decoder remain."""
    identity = build_transformer(
        TransformerConfig(
            num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=8, text_dim=8, low_resolution_skip=True
        )
    )
    pipeline = VSRPipeline(identity, _small_vae(world), placeholder_cache(8, 4)).to(world.device)
    frames, height, width = size.vae_clip
    low = seeded_noise((frames, height // 4, width // 4, 3), "tiles").mul(40).add(128).clamp(0, 255).to(torch.uint8)
    tile, overlap = size.vae_tile
    whole, tiled = (
        torch.from_numpy(pipeline(low, tiling=tiling).frames).float()
        for tiling in (Tiling(overlap_px=overlap), Tiling(vae_tile_px=tile, overlap_px=overlap))
    )
    return {"deviation": (whole - tiled).abs().mean().item(), "limit": TILES, "grey_levels_spread": whole.std().item()}


def _small_vae(world: World) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**SMALL).requires_grad_(False).eval().to(world.device)
