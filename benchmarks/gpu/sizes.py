"""The shapes of a run: `full` for a GPU, `toy` for a try on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.model.config import TransformerConfig


@dataclass(frozen=True)
class Size:
    """What the checks compute on."""

    #: DiT of the checks, and the latents (T, h, w) that it sees
    checked: TransformerConfig
    latent: tuple[int, int, int]
    #: output pixels (frames, height, width) of the VAE's check, its tile and overlap
    vae_clip: tuple[int, int, int]
    vae_tile: tuple[int, int]


SIZES = {
    "full": Size(
        checked=TransformerConfig(
            num_layers=4, num_attention_heads=4, attention_head_dim=128, ffn_dim=2048, freq_dim=256, text_dim=64
        ),
        latent=(3, 16, 24),
        vae_clip=(9, 384, 512),
        vae_tile=(256, 128),
    ),
    "toy": Size(
        checked=TransformerConfig(
            num_layers=3, num_attention_heads=2, attention_head_dim=24, ffn_dim=96, freq_dim=32, text_dim=16
        ),
        latent=(2, 4, 6),
        vae_clip=(5, 96, 128),
        vae_tile=(96, 32),
    ),
}
