"""torch.compile for the DiT's blocks: worth its minutes for long videos on GPUs."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from common.errors import UserError
from pipeline.model.transformer import VSRTransformer


def compile_blocks(transformer: VSRTransformer, device: str | torch.device) -> None:
    """Blocks are compiled when they run first, anew for another size of a window or tile.

    Raises:
        UserError: what compiles for the device is missing.
    """
    if torch.device(device).type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError("--compile needs the package triton; install it, or leave --compile out")
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--compile needs a C++ compiler (g++, or the one that CXX names); leave --compile out")
    transformer.compile_repeated_blocks()
