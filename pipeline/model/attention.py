"""Choose the attention kernels of a DiT through diffusers' dispatcher."""

from __future__ import annotations

import importlib.util
import logging

import torch

from common.errors import UserError
from pipeline.model.config import Attention
from pipeline.model.transformer import VSRTransformer

#: in the order of `auto`: our name -> (diffusers' backend, the package it needs)
BACKENDS: dict[str, tuple[str, str | None]] = {
    "flash3": ("_flash_3", "flash_attn_interface"),
    "cudnn": ("_native_cudnn", None),
    "flash": ("flash", "flash_attn"),
    "xformers": ("xformers", "xformers"),
    "native": ("native", None),
}
# All of them have a backward pass; kernels without one (SageAttention) are not offered.

#: kernels that know no float32
HALF_PRECISION = ("flash", "flash3", "cudnn")
#: major compute capability that FlashAttention-3 and cuDNN's fastest kernels are written for
HOPPER = 9
ONLY_HOPPER = ("flash3", "cudnn")


def set_attention(transformer: VSRTransformer, attention: Attention = "auto", dtype: torch.dtype | None = None) -> str:
    """Switch all attention layers; returns the name chosen.

    `auto` takes the first of `BACKENDS` that can be used here: flash3 or cudnn on a Hopper GPU, else flash, xformers or
    native, PyTorch's SDPA, which is what remains on a CPU. `automatic_choice` says why.

    Args:
        dtype: what the transformer will compute in, where that is not yet its own.

    Raises:
        UserError: an explicit choice is not installed, or it needs a GPU or half precision.
    """
    half = (dtype or transformer.dtype) in (torch.bfloat16, torch.float16)
    if attention == "auto":
        attention = next(name for name in BACKENDS if fault_of(name, half) is None)  # type: ignore[assignment, misc]
    elif (fault := fault_of(attention, half)) is not None:
        raise UserError(f"attention: {attention} {fault}; choose {' or '.join(usable(half))}")
    notices = logging.getLogger("diffusers.models.modeling_utils")
    level = notices.level
    notices.setLevel(logging.ERROR)  # that backends are experimental is no news to the user
    try:
        transformer.set_attention_backend(BACKENDS[attention][0])
    finally:
        notices.setLevel(level)
    return attention


def fault_of(name: str, half: bool) -> str | None:
    """Why a backend cannot be used here; None: it can.

    Args:
        half: whether the transformer computes in bfloat16 or float16.
    """
    package = BACKENDS[name][1]
    if package is not None and importlib.util.find_spec(package) is None:
        return f"needs the package {package} (pip install 'duo-vsr[gpu]')"
    if name != "native" and not torch.cuda.is_available():
        return "needs a GPU"
    if name in ONLY_HOPPER and torch.cuda.get_device_capability()[0] != HOPPER:
        return "needs a Hopper GPU"
    if name in HALF_PRECISION and not half:
        return "needs precision bf16"
    return None


def usable(half: bool) -> list[str]:
    """The backends that can be used here, the one of `auto` first."""
    return [name for name in BACKENDS if fault_of(name, half) is None]


def automatic_choice(half: bool) -> str:
    """One line for the log: what `auto` takes, and why not what comes before it."""
    chosen = usable(half)[0]
    before = [f"{name} {fault_of(name, half)}" for name in list(BACKENDS)[: list(BACKENDS).index(chosen)]]
    return f"attention: {chosen}" + (f" ({', '.join(before)})" if before else "")
