"""How much memory a GPU needs, from shapes alone. One formula per line, so that anyone can check it.

**Networks**: bytes per parameter and rank, n ranks, bf16 weights with float32 masters.

                     weights   gradients   masters + two moments   EMA    passing
    trained, ZeRO-1     2          4               12/n            4/n    4
    trained, ZeRO-2     2          -               12/n            4/n    2 + 4/n
    trained, ZeRO-3     2/n        4/n             12/n            4/n    4/n
    frozen              2 (ZeRO-3: 2/n)

of trainable parameters (with LoRA, a few of them); the others count as frozen beside them. "Passing" exists
only from a network's backward to the end of its step: gradients on their way to the optimizer. In float32 weights
take 4, ZeRO-1 keeps no gradients and passes 8, and ZeRO-2 passes 4 + 4/n. Moments begin with the first step.

**Activations**: bytes that a pass holds for its backward, per token and block of width d and FFN width f, in bf16 with
an attention that keeps no matrix of scores.

    trainable parameters    68·d + 4·f    48·d of it are float32 copies made around norms and gates
    constant parameters     36·d + 2·f    gradients only pass through: no input of a linear layer is kept, at ZeRO-3
                                          thanks to trainer/engine/frozen_linear.py
    checkpointed            2·d           and one block's activations during its recomputation

Where ranks share a clip, a token is one of the rank's own; tapped features and discriminator heads have all of them.

tests/trainer/test_memory.py compares all this with the bytes of all live tensors on a CPU, network by network, block by
block and over full steps of every stage; benchmarks/memory.py also does it on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.model.config import TransformerConfig
from trainer.engine.config import DeepSpeedConfig

GIB = 2**30
#: parameters that ZeRO-3 on several ranks keeps gathered of each network: what it needs again within
#: stage3_max_reuse_distance (DeepSpeed's default is 1e9) forth and back, and a prefetched bucket
REUSE_DISTANCE = 1_000_000_000


@dataclass(frozen=True)
class NetworkMemory:
    """GiB on each GPU."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    #: from its backward to the end of its step
    passing: float = 0.0

    @property
    def total(self) -> float:
        """What is always there."""
        return self.weights + self.gradients + self.optimizer + self.ema


def network_memory(
    parameters: int,
    config: DeepSpeedConfig,
    gpus: int,
    *,
    trained: bool,
    ema: bool,
    trained_parameters: int | None = None,
    moments: bool = True,
) -> NetworkMemory:
    """Of one network, of which `trained_parameters` are trainable (None: all); without ZeRO's buckets.

    Args:
        moments: False for a network that only has masters (Stage I's teacher).
    """
    width = 2 if config.precision == "bf16" else 4
    stage = config.zero_stage
    weights = parameters * width / (gpus if stage == 3 else 1)
    if config.offload_parameters and stage == 3:
        weights = 0.0
    if not trained:
        return NetworkMemory(weights / GIB, 0.0, 0.0, 0.0)
    learning = parameters if trained_parameters is None else trained_parameters
    optimizer, average = learning * (12 if moments else 4) / gpus, learning * 4 / gpus if ema else 0.0
    gradients: float
    passing: float
    if stage == 1:
        gradients, passing = (4.0, 4.0) if width == 2 else (0.0, 8.0)
    elif stage == 2:
        gradients, passing = 0.0, width + 4 / gpus
        if config.gradient_accumulation > 1:  # those of earlier micro-batches wait
            gradients, passing = 4 / gpus, float(width)
    else:
        gradients, passing = 4 / gpus, 4 / gpus
    if config.offload_optimizer:
        optimizer = average = 0.0
        if stage > 1:
            gradients, passing = 0.0, float(width) if stage == 2 else 0.0
    return NetworkMemory(
        weights / GIB, learning * gradients / GIB, optimizer / GIB, average / GIB, learning * passing / GIB
    )


def buffer_memory(parameters: int, config: DeepSpeedConfig, gpus: int, *, trained: bool) -> float:
    """GiB of ZeRO's buckets and gathered parameters of one network, on a GPU (where gathering overlaps)."""
    width = 2 if config.precision == "bf16" else 4
    if config.zero_stage == 1:
        return 0.0
    elements = float(config.bucket_size * 2 if trained else 0)
    if config.zero_stage == 3 and gpus > 1:
        elements += min(parameters, REUSE_DISTANCE // 2 + config.bucket_size)
    return elements * width / GIB


def block_bytes(dim: int, ffn_dim: int, precision: str, *, trainable: bool) -> float:
    """What one block holds from forward to backward, per token, without checkpointing."""
    if precision == "bf16":
        return 68 * dim + 4 * ffn_dim if trainable else 36 * dim + 2 * ffn_dim
    return 88 * dim + 8 * ffn_dim if trainable else 48 * dim + 4 * ffn_dim


@dataclass(frozen=True)
class ActivationSizes:
    """Sizes of the parts of a pass over one micro-batch on one rank, in bytes. A stage adds them up (`StageSpec`)."""

    #: transformer blocks, their width and their FFN's
    layers: int
    dim: int
    ffn_dim: int
    #: places of the micro-batch's latents, and their channels
    places: int
    latent_channels: int
    #: tokens of the micro-batch, and those of them that this rank computes
    tokens: int
    own_tokens: int
    #: bytes per element of activations
    width: int
    #: a latent in float32, bytes per token
    latent: int
    precision: str
    checkpointed: bool

    @classmethod
    def of(
        cls,
        shape: TransformerConfig,
        engine: DeepSpeedConfig,
        latent: tuple[int, int, int],
        batch: int,
        sequence_parallel: int,
    ) -> ActivationSizes:
        """
        Args:
            latent: (T, h, w) of one clip.
            batch: clips per micro-batch.
            sequence_parallel: ranks that share the tokens of a clip.
        """
        tokens = math.prod(size // patch for size, patch in zip(latent, shape.patch_size, strict=True))
        return cls(
            layers=shape.num_layers,
            dim=shape.num_attention_heads * shape.attention_head_dim,
            ffn_dim=shape.ffn_dim,
            places=batch * math.prod(latent),
            latent_channels=shape.latent_channels,
            tokens=batch * tokens,
            own_tokens=batch * -(-tokens // sequence_parallel),
            width=2 if engine.precision == "bf16" else 4,
            latent=4 * shape.latent_channels * math.prod(shape.patch_size),
            precision=engine.precision,
            checkpointed=engine.activation_checkpointing,
        )

    def update(self, latents: int = 1) -> float:
        """Forward and backward of one trained network; `latents`: those per sample in its batch."""
        return latents * (self.graph(self.layers, trained=True) + self.work(trained=True) + self.ends())

    def last_block(self, latents: int = 1) -> float:
        """What is left of `update` when backward comes to its end."""
        return latents * (self.graph(1, trained=True) + self.work(trained=True))

    def graph(self, blocks: int, *, trained: bool) -> float:
        """What `blocks` blocks hold between forward and backward."""
        if self.checkpointed:
            return blocks * self.own_tokens * self.width * self.dim
        return blocks * self.own_tokens * self._block(trained)

    def work(self, *, trained: bool) -> float:
        """What is alive besides while a block is computed, forward or backward."""
        inside: float = self.own_tokens * self.width * (5 * self.dim + 2 * self.ffn_dim)
        if self.checkpointed:
            inside += self.own_tokens * self._block(trained)
        return inside

    def ends(self) -> float:
        """The last norm and projection, and latents: z, noise, targets, predictions."""
        return self.own_tokens * 12 * self.dim + self.tokens * 12 * self.latent

    def feature(self) -> float:
        """One tapped feature map, of all tokens."""
        return self.tokens * self.width * self.dim

    def _block(self, trained: bool) -> float:
        return block_bytes(self.dim, self.ffn_dim, self.precision, trainable=trained)


def saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """What a pass through a module on the meta device holds for its backward, its parameters left out."""
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    held: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor  # kept, so that no later one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = module(*inputs)
    del result
    return sum(tensor.untyped_storage().nbytes() for key, tensor in held.items() if key not in parameters)
