"""How much memory a GPU needs, from shapes alone. One formula per line, so that anyone can check it.

Bytes per parameter and rank, n ranks, bf16 weights with float32 masters:

                     weights   gradients (float32)   masters + two moments   EMA
    trained, ZeRO-1     2             4                     12/n             4/n
    trained, ZeRO-2     2             4/n                   12/n             4/n
    trained, ZeRO-3     2/n           4/n                   12/n             4/n
    frozen              2 (ZeRO-3: 2/n)

of parameters that learn (with LoRA, a few of them); those that don't count as frozen beside them.

Activations of one transformer block for S tokens of width d and FFN width f, batch b, are about
b·S·(18·d + 2·f)·2 bytes in bf16 with fused attention; activation checkpointing keeps b·S·d·2 bytes per block and one
block whole. Where ranks share a clip, S counts the tokens of one rank; tapped features and discriminator heads have
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import TransformerConfig
from trainer.networks import DeepSpeedConfig

GIB = 2**30


@dataclass(frozen=True)
class NetworkMemory:
    """GiB on each GPU."""

    weights: float
    gradients: float
    optimizer: float
    ema: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.ema


def network_memory(
    parameters: int,
    config: DeepSpeedConfig,
    gpus: int,
    *,
    trained: bool,
    ema: bool,
    trained_parameters: int | None = None,
) -> NetworkMemory:
    """Static memory of one network, of which `trained_parameters` learn (None: all)."""
    width = 2 if config.precision == "bf16" else 4
    stage = config.zero_stage
    weights = parameters * width / (gpus if stage == 3 else 1)
    if config.offload_parameters and stage == 3:
        weights = 0.0
    if not trained:
        return NetworkMemory(weights / GIB, 0.0, 0.0, 0.0)
    parameters = parameters if trained_parameters is None else trained_parameters
    gradients = parameters * 4 / (gpus if stage >= 2 else 1)
    # In float32 the weights are the masters at ZeRO-3; DeepSpeed still keeps a flat copy of its own.
    optimizer = 0.0 if config.offload_optimizer else parameters * 12 / gpus
    average = parameters * 4 / gpus if ema and not config.offload_optimizer else 0.0
    return NetworkMemory(weights / GIB, gradients / GIB, optimizer / GIB, average / GIB)


def activation_memory(
    shape: TransformerConfig,
    latent: tuple[int, int, int],
    batch: int,
    config: DeepSpeedConfig,
    sequence_parallel: int = 1,
) -> float:
    """GiB of activations of one forward with gradient, for latents of (T, h, w) shared by so many ranks."""
    tokens = 1
    for size, patch in zip(latent, shape.patch_size, strict=True):
        tokens *= size // patch
    tokens = -(-tokens // sequence_parallel)
    width = 2 if config.precision == "bf16" else 4
    dim = shape.num_attention_heads * shape.attention_head_dim
    block = batch * tokens * (18 * dim + 2 * shape.ffn_dim) * width
    if config.activation_checkpointing:
        return (shape.num_layers * batch * tokens * dim * width + block) / GIB
    return shape.num_layers * block / GIB
