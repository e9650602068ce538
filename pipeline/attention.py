"""Choose the attention kernels of a DiT through diffusers' dispatcher."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from pipeline.errors import UserError
from pipeline.transformer import VSRTransformer

Attention = Literal["auto", "flash", "flash3", "xformers", "native"]

#: our name -> (diffusers' backend, the package it needs)
BACKENDS: dict[str, tuple[str, str | None]] = {
    "flash": ("flash", "flash_attn"),
    "flash3": ("_flash_3", "flash_attn_interface"),
    "xformers": ("xformers", "xformers"),
    "native": ("native", None),
}


def set_attention(transformer: VSRTransformer, attention: Attention = "auto") -> str:
    """Switch all attention layers; returns the name chosen.

    `auto` takes flash3, flash or native on a GPU, in this order, and native (PyTorch's SDPA) on a CPU.

    Raises:
        UserError: the package of an explicit choice is not installed, or it needs a GPU.
    """
    if attention == "auto":
        candidates: tuple[Attention, ...] = ("flash3", "flash") if torch.cuda.is_available() else ()
        attention = next((name for name in candidates if _installed(name)), "native")
    backend, package = BACKENDS[attention]
    if package is not None:
        if not _installed(attention):
            raise UserError(
                f"attention: {attention} needs the package {package}; pip install 'duo-vsr[gpu]', or choose native"
            )
        if not torch.cuda.is_available():
            raise UserError(f"attention: {attention} needs a GPU; choose native")
    transformer.set_attention_backend(backend)
    return attention


def _installed(name: str) -> bool:
    package = BACKENDS[name][1]
    return package is None or importlib.util.find_spec(package) is not None
