"""Give a trained DiT smaller tokens: patch (1, 2, 2) to (1, 1, 1), four times as many tokens, the same blocks.

    python -m tools.finer_patches --model FOLDER --output FOLDER

A small model learns the coarse things fast with few tokens, and local detail only with many. The patch embedding
becomes its sum over the rows and columns of a patch, the output projection its mean: on latents that are constant
within a patch, all tokens of a patch start as the one they were. The rotary positions are finer by two: some hundred
steps of training follow (docs/small.md). The output is what `model.initial_weights` reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError, run_command
from pipeline.model.config import TransformerConfig
from pipeline.model.load_weights import load_transformer, saved_config
from pipeline.model.transformer import VSRTransformer


def finer(model: VSRTransformer) -> VSRTransformer:
    """A model of patch (p_t, 1, 1) from one of (p_t, p_h, p_w), float32.

    Raises:
        UserError: its tokens are one row and one column already.
    """
    frames, height, width = model.config.patch_size
    if height * width == 1:
        raise UserError(f"patch {tuple(model.config.patch_size)}: each token is one row and one column already")
    names = TransformerConfig.model_fields
    settings = {name: value for name, value in model.config.items() if name in names}
    result = VSRTransformer(**{**settings, "patch_size": (frames, 1, 1)})
    state = dict(model.state_dict())
    state["patch_embedding.weight"] = state["patch_embedding.weight"].sum((3, 4), keepdim=True)
    for name in ("proj_out.weight", "proj_out.bias"):
        state[name] = _mean_over_places(state[name], frames, height * width)
    result.load_state_dict(state)
    return result


def _mean_over_places(projection: Tensor, frames: int, places: int) -> Tensor:
    """(p_t·p_h·p_w·C, …) -> (p_t·C, …); diffusers orders rows as frame, row, column, channel."""
    return projection.unflatten(0, (frames, places, -1)).mean(1).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a DiT of ours, with its config.json")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with torch.no_grad():
        finer(load_transformer(arguments.model, saved_config(arguments.model))).save_pretrained(arguments.output)


if __name__ == "__main__":
    run_command(main)
