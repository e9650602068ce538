"""How a network is optimised, sharded and adapted: configuration only, without torch or DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from common.config import Section

if TYPE_CHECKING:
    import torch


class OptimizerConfig(Section):
    """AdamW. Groups may override the learning rate (the discriminator heads do)."""

    #: peak learning rate
    learning_rate: float = Field(gt=0)
    #: β1 and β2; β1 = 0: no momentum beside a discriminator [peer: FastGen, DMD2]
    betas: tuple[float, float] = (0.0, 0.999)
    #: decoupled weight decay [peer]
    weight_decay: float = Field(0.01, ge=0)
    #: largest gradient norm over all ranks; groups may have their own (the heads do); 0 = no clipping [peer]
    gradient_clip: float = Field(1.0, ge=0)
    #: linear warm-up, in updates of this network; every group keeps its own peak
    warmup_updates: int = Field(0, ge=0)


class DeepSpeedConfig(Section):
    """How one network is sharded and computed; each network of a stage may have its own."""

    #: what ZeRO shards: 1 = optimizer states, 2 = gradients too, 3 = weights too
    zero_stage: Literal[1, 2, 3] = 3
    #: bf16: weights and activations in bfloat16, masters, moments and accumulated gradients in float32
    precision: Literal["bf16", "fp32"] = "bf16"
    #: keep float32 masters and Adam moments on the host
    offload_optimizer: bool = False
    #: keep the weight shards on the host too (ZeRO-3)
    offload_parameters: bool = False
    #: micro-batches per update of the network; with the ranks it divides the global batch
    gradient_accumulation: int = Field(1, ge=1)
    #: recompute the activations of each block in the backward pass: less memory, one more forward
    activation_checkpointing: bool = False
    #: ZeRO-3: parameters smaller than this stay unsharded on every rank [peer: DeepSpeed]
    persistence_threshold: int = Field(100_000, ge=0)
    #: ZeRO: elements reduced at a time
    bucket_size: int = Field(100_000_000, ge=1)

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class LoRAConfig(Section):
    """The adapter of one network."""

    #: rank of the low-rank product [peer: LightX2V, step distillation of Wan2.1]
    rank: int = Field(default=64, ge=1)
    #: the product is scaled by alpha/rank; null = rank, that is by 1 [peer: diffusers' training scripts]
    alpha: float | None = Field(default=None, gt=0)
    #: linear layers with an adapter, each the end of a name: attention and FFN of every block [peer: LightX2V]
    target_modules: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"), min_length=1
    )
    #: modules that are trained in full, by their full names: where z_LR enters (zero in text-to-video weights, so no
    #: thin correction would do) and where the velocity leaves [ours]
    trained_modules: tuple[str, ...] = ("patch_embedding", "proj_out")
