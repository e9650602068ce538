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
Attention = Literal["auto", "flash3", "cudnn", "flash", "xformers", "native"]


class TransformerConfig(Section):
    """Shape of the DiT; defaults are Wan2.1-T2V-1.3B's (its public config.json) [peer: Wan2.1]."""

    #: transformer blocks
    num_layers: int = Field(30, ge=1)
    #: heads of self- and cross-attention
    num_attention_heads: int = Field(12, ge=1)
    #: channels per head, even
    attention_head_dim: int = Field(128, ge=6)
    #: hidden channels of the feed-forward layers
    ffn_dim: int = Field(8960, ge=1)
    #: channels of the sinusoidal embedding of t
    freq_dim: int = Field(256, ge=2)
    #: channels of the prompt embeddings; 4096 is umT5-xxl's
    text_dim: int = Field(4096, ge=1)
    #: latent frames, rows and columns per token
    patch_size: tuple[int, int, int] = (1, 2, 2)
    #: channels of the VAE's latents; the DiT reads twice as many, z_t beside z_LR
    latent_channels: int = Field(16, ge=1)
    #: the network predicts the difference to what z_t and z_LR say without it; for models trained from random weights
    #: [ours]
    low_resolution_skip: bool = False
    #: σ of z_HR - z_LR, only with low_resolution_skip: what is left for the network then has unit size at every t; 0:
    #: the difference to (z_t - z_LR)/t [ours]
    low_resolution_deviation: float = Field(0.0, ge=0)
    #: a prediction of z_HR from z_LR in the place of z_LR there, and a σ for each channel, which begins at
    #: low_resolution_deviation; both are trained with the network [ours]
    low_resolution_predictor: bool = False
    #: residual blocks of the prediction, on top of its linear filter [ours]
    predictor_blocks: int = Field(0, ge=0)
    #: channels of the residual blocks [ours]
    predictor_width: int = Field(96, ge=1)
    #: the DiT reads what z_t holds beside the prediction, at unit size, instead of z_t [ours]
    residual_input: bool = False

    @model_validator(mode="after")
    def _deviation_needs_the_skip(self) -> TransformerConfig:
        if self.low_resolution_deviation and not self.low_resolution_skip:
            raise ValueError("low_resolution_deviation means nothing without low_resolution_skip: true; set it, or 0")
        if self.low_resolution_predictor and not self.low_resolution_deviation:
            raise ValueError("low_resolution_predictor needs a low_resolution_deviation above 0; set it, or false")
        if self.predictor_blocks and not self.low_resolution_predictor:
            raise ValueError("predictor_blocks means nothing without low_resolution_predictor: true; set it, or 0")
        if self.residual_input and not self.low_resolution_deviation:
            raise ValueError("residual_input needs a low_resolution_deviation above 0; set it, or false")
        return self


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
