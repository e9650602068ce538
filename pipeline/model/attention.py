"""Choose the attention kernels of a DiT through diffusers' dispatcher."""

from __future__ import annotations

import importlib.util

import torch

from common.errors import UserError
from pipeline.model.config import Attention
from pipeline.model.transformer import VSRTransformer

#: our name -> (diffusers' backend, the package it needs)
BACKENDS: dict[str, tuple[str, str | None]] = {
    "flash": ("flash", "flash_attn"),
    "flash3": ("_flash_3", "flash_attn_interface"),
    "xformers": ("xformers", "xformers"),
    "native": ("native", None),
}

HALF_PRECISION = ("flash", "flash3")
#: major compute capability that FlashAttention-3 is written for
HOPPER = 9


def set_attention(transformer: VSRTransformer, attention: Attention = "auto", dtype: torch.dtype | None = None) -> str:
    """Switch all attention layers; returns the name chosen.

    `auto` takes flash3 (Hopper only), flash or native on a GPU, in this order, and native (PyTorch's SDPA) on a CPU or
    in float32, which the flash kernels do not know.

    Args:
        dtype: what the transformer will compute in, where that is not yet its own.

    Raises:
        UserError: an explicit choice is not installed, or it needs a GPU or half precision.
    """
    half = (dtype or transformer.dtype) in (torch.bfloat16, torch.float16)
    if attention == "auto":
        candidates: tuple[Attention, ...] = ("flash3", "flash") if torch.cuda.is_available() and half else ()
        attention = next((name for name in candidates if _installed(name) and _fits_gpu(name)), "native")
    backend, package = BACKENDS[attention]
    if package is not None:
        if not _installed(attention):
            raise UserError(
                f"attention: {attention} needs the package {package}; pip install 'duo-vsr[gpu]', or choose native"
            )
        if not torch.cuda.is_available():
            raise UserError(f"attention: {attention} needs a GPU; choose native")
        if not _fits_gpu(attention):
            raise UserError(f"attention: {attention} needs a Hopper GPU; choose flash or native")
        if attention in HALF_PRECISION and not half:
            raise UserError(f"attention: {attention} needs bf16; choose native, or precision bf16")
    transformer.set_attention_backend(backend)
    return attention


def _installed(name: str) -> bool:
    package = BACKENDS[name][1]
    return package is None or importlib.util.find_spec(package) is not None


def _fits_gpu(name: str) -> bool:
    return name != "flash3" or torch.cuda.get_device_capability()[0] == HOPPER
