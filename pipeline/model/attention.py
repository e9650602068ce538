"""Choose the attention kernels of a DiT through diffusers' dispatcher."""

from __future__ import annotations

import importlib.util

import torch

from common.errors import UserError
from pipeline.model.config import Attention
from pipeline.model.transformer import VSRTransformer

#: our name -> (diffusers' backend, the package it needs)
BACKENDS: dict[str, tuple[str, str | None]] = {
    "flash3": ("_flash_3", "flash_attn_interface"),
    "cudnn": ("_native_cudnn", None),
    "flash": ("flash", "flash_attn"),
    "xformers": ("xformers", "xformers"),
    "native": ("native", None),
}

#: all of them have a backward pass; kernels without one (SageAttention) are not offered
HALF_PRECISION = ("flash", "flash3", "cudnn")
#: major compute capability that FlashAttention-3 and cuDNN's fastest kernels are written for
HOPPER = 9
ONLY_HOPPER = ("flash3", "cudnn")


def set_attention(transformer: VSRTransformer, attention: Attention = "auto", dtype: torch.dtype | None = None) -> str:
    """Switch all attention layers; returns the name chosen.

    `auto` takes the first that is there of flash3 and cudnn (Hopper only), flash, xformers and native on a GPU, and
    native (PyTorch's SDPA) on a CPU or in float32, which the others do not know. Why it took it: `reasons`.

    Args:
        dtype: what the transformer will compute in, where that is not yet its own.

    Raises:
        UserError: an explicit choice is not installed, or it needs a GPU or half precision.
    """
    half = (dtype or transformer.dtype) in (torch.bfloat16, torch.float16)
    if attention == "auto":
        attention = next(name for name, fault in reasons(half).items() if fault is None)  # type: ignore[assignment, misc]
    backend, package = BACKENDS[attention]
    if package is not None and not _installed(attention):
        raise UserError(
            f"attention: {attention} needs the package {package}; pip install 'duo-vsr[gpu]', or choose native"
        )
    if attention != "native":
        if not torch.cuda.is_available():
            raise UserError(f"attention: {attention} needs a GPU; choose native")
        if not _fits_gpu(attention):
            raise UserError(f"attention: {attention} needs a Hopper GPU; choose flash or native")
        if attention in HALF_PRECISION and not half:
            raise UserError(f"attention: {attention} needs bf16; choose native, or precision bf16")
    transformer.set_attention_backend(backend)
    return attention


def reasons(half: bool) -> dict[str, str | None]:
    """Each backend in the order of `auto`, and why it cannot be used here; None: it can.

    Args:
        half: whether the transformer computes in bfloat16 or float16.
    """
    found: dict[str, str | None] = {}
    for name, (_, package) in BACKENDS.items():
        fault = None
        if name != "native":
            if not torch.cuda.is_available():
                fault = "no GPU"
            elif not half:
                fault = "not in half precision"
            elif not _installed(name):
                fault = f"{package} is not installed"
            elif not _fits_gpu(name):
                fault = "no Hopper GPU"
        found[name] = fault
    return found


def explained(chosen: str, half: bool) -> str:
    """One line for the log: what was chosen, and why not what comes before it."""
    before = []
    for name, fault in reasons(half).items():
        if name == chosen:
            break
        before.append(f"{name}: {fault or 'not chosen'}")
    return f"attention: {chosen}" + (f" ({', '.join(before)})" if before else "")


def _installed(name: str) -> bool:
    package = BACKENDS[name][1]
    return package is None or importlib.util.find_spec(package) is not None


def _fits_gpu(name: str) -> bool:
    return name not in ONLY_HOPPER or torch.cuda.get_device_capability()[0] == HOPPER
