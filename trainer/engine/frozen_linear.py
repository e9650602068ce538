"""Linear layers beside ZeRO-3 that keep nothing for a backward that doesn't need it.

With its first ZeRO-3 network DeepSpeed replaces torch.nn.functional.linear, for all networks of the process, by a
function that saves the weight as the parameter it is: torch would save a view of the gathered copy, which then stays
alive. It also saves the input, which only the weight's gradient needs. A frozen network has none: the score models of
Stage II, whose gradients flow to their inputs, and LoRA's constant weights would hold 3·d + f values per token and
block for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.utils import is_zero_param
from torch import Tensor
from torch.nn import functional


class _ConstantLinear(torch.autograd.Function):
    """y = x Wᵀ + b with constant W and b."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x.matmul(weight.t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """∂L/∂x = ∂L/∂y · W, with W gathered for as long as that takes where it is sharded by now."""
        (weight,) = ctx.saved_tensors
        sharded = is_zero_param(weight) and weight.ds_status.name == "NOT_AVAILABLE"
        if sharded:
            weight.all_gather()
        try:
            return gradients[0].matmul(weight), None, None
        finally:
            if sharded:
                weight.partition()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear for tensors of one dtype; differentiable once."""
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return zero3_linear_wrap(x, weight, bias)
    return _ConstantLinear.apply(x, weight, bias)


def use_for_constant_weights() -> None:
    """Take the place of DeepSpeed's replacement, if it is in place."""
    if functional.linear is zero3_linear_wrap:
        functional.linear = linear
