"""The DiT: diffusers' Wan transformer, conditioned on z_LR by channels, with features as outputs.

Parameter names and shapes are those of `diffusers.WanTransformer3DModel` except the patch embedding, whose
input is [z_t, z_LR] along channels. Features are returned, never caught by hooks: under ZeRO-3 a gradient that
enters through a forward hook skips the root module's pre-backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from common.errors import UserError
from pipeline.model.low_resolution_skip import LowResolutionPredictor, normalised_residual, skip_velocity
from pipeline.model.sequence_parallel import ALONE, SequenceGroup, UlyssesAttention, check_heads

#: DiffusionPipeline.from_pretrained looks for this name in a component's module to learn how it is loaded.
__all__ = ["ModelMixin", "VSROutput", "VSRTransformer", "tapped_layers", "widen_patch_embedding"]


class VSROutput(NamedTuple):
    """Velocity (B, C, T, H, W) or None, and one token tensor (B, N, D) per tapped layer."""

    velocity: Tensor | None
    features: tuple[Tensor, ...]


class VSRTransformer(WanTransformer3DModel):
    """Predicts v_θ(z_t, t, z_LR, c) and, on request, the hidden states after chosen blocks.

    Arguments are those of `WanTransformer3DModel` with these changes: `latent_channels` replaces
    `in_channels` (which is twice that) and `out_channels`; `low_resolution_skip` makes the network predict
    the difference to `skip_velocity`, so that a zero output projection means ẑ0 = z_LR at t = 1;
    `low_resolution_predictor` puts a prediction of z_HR in the place of z_LR there, `predictor_blocks` and
    `predictor_width` make it more than a linear filter; `residual_input` shows the network `normalised_residual`
    instead of z_t. All this is for models trained from nothing (the small presets) and off for Wan weights.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        low_resolution_skip: bool = False,
        low_resolution_deviation: float = 0.0,
        low_resolution_predictor: bool = False,
        predictor_blocks: int = 0,
        predictor_width: int = 96,
        residual_input: bool = False,
    ) -> None:
        # The parent's own `register_to_config` would record its arguments as ours.
        WanTransformer3DModel.__init__.__wrapped__(
            self,
            patch_size=tuple(patch_size),
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=2 * latent_channels,
            out_channels=latent_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            rope_max_seq_len=rope_max_seq_len,
        )
        if low_resolution_predictor:
            self.predictor = LowResolutionPredictor(
                latent_channels, low_resolution_deviation, predictor_blocks, predictor_width
            )
        self.sequence = ALONE

    def share_sequence(self, group: SequenceGroup) -> None:
        """From now on, run on the tokens of `group` together: every rank of it makes the same calls.

        Raises:
            UserError: the attention heads cannot be divided among the ranks.
        """
        check_heads(self.config.num_attention_heads, group.size)
        self.sequence = group
        if group.size > 1:
            for block in self.blocks:
                backend = block.attn1.processor._attention_backend
                block.attn1.set_processor(UlyssesAttention(group, backend))

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        z_lr: Tensor,
        prompt: Tensor,
        feature_layers: tuple[int, ...] = (),
        features_only: bool = False,
    ) -> VSROutput:
        """Run the DiT.

        Args:
            z_t: noisy latent, (B, C, T, H, W).
            t: flow-matching time in [0, 1], (B,); scaled to Wan's 0…1000 here and nowhere else.
            z_lr: latent of the upsampled LR clip, same shape as `z_t`.
            prompt: text embeddings, (B, L, text_dim).
            feature_layers: 1-based blocks whose output is returned, ascending.
            features_only: stop after the last tapped block; `velocity` is then None.
        """
        self._check(z_t, z_lr, feature_layers, features_only)
        z_t, t, z_lr, prompt = (self.sequence.enter(value) for value in (z_t, t, z_lr, prompt))
        dtype = self.patch_embedding.weight.dtype
        time = t.view(-1, 1, 1, 1, 1)
        mean, deviation = self._mean_and_deviation(z_lr)
        shown = normalised_residual(z_t, time, mean, deviation) if self.config.residual_input else z_t
        x = torch.cat([shown.to(dtype), z_lr.to(dtype)], dim=1)
        rotary = self.sequence.share_rotary(self.rope(x))
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        tokens = x.shape[1]
        x = self.sequence.share(x).contiguous()
        temb, time_projection, text, _ = self.condition_embedder(t.float() * 1000, prompt.to(dtype))
        time_projection = time_projection.unflatten(1, (6, -1))

        features = []
        last = feature_layers[-1] if features_only else len(self.blocks)
        for number, block in enumerate(self.blocks[:last], start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, text, time_projection, rotary)
            else:
                x = block(x, text, time_projection, rotary)
            if number in feature_layers:
                features.append(self.sequence.gather_tokens(x, tokens))
        if features_only:
            return VSROutput(None, tuple(features))

        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        x = (self.norm_out(x.float()) * (1 + scale) + shift).to(dtype)
        v = self._unpatchify(self.sequence.gather_tokens(self.proj_out(x), tokens), z_t.shape)
        if self.config.low_resolution_skip:
            v = v + skip_velocity(z_t, time, mean, deviation)
        return VSROutput(v, tuple(features))

    def _mean_and_deviation(self, z_lr: Tensor) -> tuple[Tensor, float | Tensor]:
        """What the skip takes for the mean of z_HR, and how far z_HR lies from it."""
        if self.config.low_resolution_predictor:
            return self.predictor(z_lr)
        return z_lr, self.config.low_resolution_deviation

    def _unpatchify(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        batch, channels, frames, height, width = shape
        p_t, p_h, p_w = self.config.patch_size
        grid = (frames // p_t, height // p_h, width // p_w)
        x = tokens.reshape(batch, *grid, p_t, p_h, p_w, channels)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(shape)

    def _check(self, z_t: Tensor, z_lr: Tensor, feature_layers: tuple[int, ...], features_only: bool) -> None:
        if z_t.shape != z_lr.shape:
            raise ValueError(f"z_t has shape {tuple(z_t.shape)}, z_lr {tuple(z_lr.shape)}; they must be equal")
        if any(size % patch for size, patch in zip(z_t.shape[2:], self.config.patch_size, strict=True)):
            raise ValueError(
                f"latent size {tuple(z_t.shape[2:])} is not a multiple of patch size {self.config.patch_size}"
            )
        depth = len(self.blocks)
        ascending = list(feature_layers) == sorted(set(feature_layers))
        if not ascending or any(not 1 <= layer <= depth for layer in feature_layers):
            raise ValueError(f"feature_layers {feature_layers} must ascend within 1…{depth}")
        if features_only and not feature_layers:
            raise ValueError("features_only needs feature_layers")


def tapped_layers(num_layers: int, fractions: tuple[float, ...] = (0.3, 0.6, 0.9)) -> tuple[int, ...]:
    """1-based layers at the given depths: 9, 18, 27 of 30 (paper, Fig. 10)."""
    return tuple(sorted({max(1, round(fraction * num_layers)) for fraction in fractions}))


def widen_patch_embedding(weight: Tensor, latent_channels: int) -> Tensor:
    """Zero-pad a (D, C, *patch) text-to-video patch embedding to (D, 2C, *patch), z_LR's half being zero."""
    if weight.shape[1] == 2 * latent_channels:
        return weight
    if weight.shape[1] != latent_channels:
        raise UserError(
            f"patch_embedding.weight has {weight.shape[1]} input channels; expected {latent_channels} "
            f"(text-to-video) or {2 * latent_channels} (VSR): these weights belong to another VAE"
        )
    return torch.cat([weight, torch.zeros_like(weight)], dim=1)
