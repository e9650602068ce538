"""One attention backend, forward and backward, against PyTorch's mathematical attention in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import stage_two
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.table import NotHere
from pipeline.model.attention import fault_of, set_attention
from pipeline.model.prompts import placeholder_cache
from pipeline.model.transformer import VSRTransformer
from trainer.engine.process_group import World

#: relative L2 error of any of the compared tensors
LIMITS = {torch.bfloat16: 0.05, torch.float32: 1e-4}
BLOCKS = 2


def attention_error(backend: Any, dtype: torch.dtype, size: Size, world: World) -> dict[str, float]:
    """Of the velocity, of the gradients at z_t and at the weights of query, key and value.

    Raises:
        NotHere: the backend cannot be used on this machine.
    """
    fault = fault_of(backend, dtype == torch.bfloat16)
    if fault is not None:
        raise NotHere(fault)
    torch.manual_seed(0)
    model = VSRTransformer(**(size.checked.model_dump() | {"num_layers": BLOCKS})).to(world.device)
    set_attention(model, "native")
    with sdpa_kernel(SDPBackend.MATH):
        expected = _outputs(model, size, world)
    model.to(dtype)
    model.rope.to(torch.float32)
    set_attention(model, backend)
    found = _outputs(model, size, world)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    return {"deviation": max(errors), "limit": LIMITS[dtype]}


def _outputs(model: VSRTransformer, size: Size, world: World) -> list[Tensor]:
    tensors = stage_two.batch(size.checked, size.latent, "attention").tensors
    z_t, z_lr = (tensors[name].to(world.device) for name in ("z_hr", "z_lr"))
    prompt = placeholder_cache(size.checked.text_dim, 4).embed([stage_two.DEFAULT_PROMPT]).to(world.device)
    z_t.requires_grad_()
    velocity = model(z_t, torch.full((1,), 0.7, device=world.device), z_lr, prompt).velocity
    weights = [
        p for name, p in model.named_parameters() if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight"))
    ]
    assert velocity is not None
    gradients = torch.autograd.grad((velocity.float() * z_lr).sum(), [z_t, *weights])
    return [tensor.detach().float() for tensor in (velocity, *gradients)]
