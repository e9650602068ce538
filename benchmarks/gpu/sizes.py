"""The shapes of a run: `full` for a GPU, `toy` for a try on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.model.config import TransformerConfig


@dataclass(frozen=True)
class Size:
    """What the parts compute on."""

    #: DiT of the checks, and the latents (T, h, w) that it sees
    checked: TransformerConfig
    latent: tuple[int, int, int]
    #: precisions in which compiled blocks are checked
    compiled: tuple[Literal["fp32", "bf16"], ...]
    #: output pixels (frames, height, width) of the VAE's check, its tile and overlap
    vae_clip: tuple[int, int, int]
    vae_tile: tuple[int, int]
    #: DiT of the part `speed`, the latents of its rounds, its VAE, its clip in output pixels, and a tile that fits
    paper: TransformerConfig
    trained_latents: tuple[tuple[int, int, int], ...]
    speed_vae: dict[str, Any]
    upscaled: tuple[int, int, int]
    speed_tile: int


SIZES = {
    "full": Size(
        checked=TransformerConfig(
            num_layers=4, num_attention_heads=4, attention_head_dim=128, ffn_dim=2048, freq_dim=256, text_dim=64
        ),
        latent=(3, 16, 24),
        compiled=("fp32", "bf16"),
        vae_clip=(9, 384, 512),
        vae_tile=(256, 128),
        paper=TransformerConfig(),  # Wan2.1-T2V-1.3B
        trained_latents=((6, 60, 104), (6, 88, 160)),  # 21 frames of 480 x 832 and of 704 x 1280
        speed_vae={},  # Wan2.1's
        upscaled=(21, 1080, 1920),  # the paper's timing
        speed_tile=768,
    ),
    "toy": Size(
        checked=TransformerConfig(
            num_layers=1, num_attention_heads=2, attention_head_dim=24, ffn_dim=96, freq_dim=32, text_dim=16
        ),
        latent=(2, 4, 6),
        compiled=("fp32",),  # inductor compiles C++ here: most of the time that the toy size takes
        vae_clip=(5, 96, 128),
        vae_tile=(96, 32),
        paper=TransformerConfig(
            num_layers=3, num_attention_heads=2, attention_head_dim=24, ffn_dim=96, freq_dim=32, text_dim=16
        ),
        trained_latents=((2, 4, 6),),
        speed_vae={"base_dim": 8, "num_res_blocks": 1},
        upscaled=(9, 128, 192),
        speed_tile=160,
    ),
}
