"""The `model` section of a preset: the shape of the DiT and where weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from common.config import Section

#: prompt of every clip that has no caption [ours]
DEFAULT_PROMPT = "high quality video"
#: what classifier-free guidance subtracts
NULL_PROMPT = ""
#: attention kernels of the DiT (pipeline/model/attention.py)
Attention = Literal["auto", "flash", "flash3", "xformers", "native"]


class TransformerConfig(Section):
    """Shape of the DiT; defaults are Wan2.1-T2V-1.3B's (its public config.json)."""

    num_layers: int = Field(30, ge=1)
    num_attention_heads: int = Field(12, ge=1)
    attention_head_dim: int = Field(128, ge=6)
    ffn_dim: int = Field(8960, ge=1)
    freq_dim: int = Field(256, ge=2)
    text_dim: int = Field(4096, ge=1)  # umT5-xxl
    patch_size: tuple[int, int, int] = (1, 2, 2)
    latent_channels: int = Field(16, ge=1)
    low_resolution_skip: bool = False  # ours: for models trained from nothing, see pipeline/model/transformer.py


class ModelConfig(Section):
    """The networks and the folders their weights come from."""

    transformer: TransformerConfig = TransformerConfig()
    #: folder with a diffusers VAE (AutoencoderKLWan or TinyVideoVAE)
    vae: Path
    #: folder of the prompt cache (pipeline/model/prompts.py); made by `python -m pipeline.model.prompts`
    prompts: Path
    #: DiT weights to start the base model from: a Wan2.1 folder or one of our model folders; null = random
    initial_weights: Path | None = None
    #: timestep shift s of sampling and training [peer: Wan2.1]
    shift: float = Field(5.0, gt=0)
    #: Euler steps of the multi-step base model [paper]
    base_steps: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _head_dim_is_even(self) -> ModelConfig:
        if self.transformer.attention_head_dim % 2:
            raise ValueError("transformer.attention_head_dim must be even: rotary embedding turns pairs")
        return self
