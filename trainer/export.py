"""What a stage leaves behind: a model folder that `VSRPipeline.from_pretrained` opens, with a card that says where it
comes from."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from common.atomic import atomic_folder
from pipeline.model.config import ModelConfig
from pipeline.model.prompts import PromptCache
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import VAE
from pipeline.vsr_pipeline import VSRPipeline

#: a training set's cache may hold a prompt for every clip, gigabytes of them [ours]
EXPORTED_PROMPTS = 64


def export_model(
    folder: Path,
    state: dict[str, Tensor],
    model: ModelConfig,
    vae: VAE,
    prompts: PromptCache,
    *,
    steps: int,
    guidance_weight: float = 0.0,
    dtype: torch.dtype = torch.float32,
    card: dict[str, Any],
) -> None:
    """Write a model folder atomically; an older one under the same name is replaced.

    Args:
        state: the transformer's weights, float32.
        prompts: the first `EXPORTED_PROMPTS` of them come along.
        steps: Euler steps the model is meant for.
        card: what the model card records: stage, data manifest, configuration, last numbers.

    Raises:
        UserError: it cannot be written (a full disk); an older one is untouched.
    """
    transformer = VSRTransformer(**model.transformer.model_dump())
    transformer.load_state_dict(state, strict=True)
    transformer.to(dtype)
    pipeline = VSRPipeline(
        transformer,
        vae,
        prompts.first(EXPORTED_PROMPTS),
        num_inference_steps=steps,
        shift=model.shift,
        guidance_weight=guidance_weight,
    )
    with atomic_folder(folder) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)
        (partial / "README.md").write_text(model_card(steps, card))


def export_folder(folder: Path, write: Callable[[Path], None], card: dict[str, Any]) -> None:
    """What `write` puts into a folder, and a card, atomically; an older one under the same name is replaced.

    Raises:
        UserError: it cannot be written (a full disk); an older one is untouched.
    """
    with atomic_folder(folder) as partial:
        write(partial)
        text = f"# DUO-VSR, stage {card.get('stage', '?')}\n\nWhere it comes from:\n\n"
        (partial / "README.md").write_text(f"{text}```json\n{json.dumps(card, indent=2, default=str)}\n```\n")


def add_components(folder: Path, model: Path, components: dict[str, ModelMixin]) -> None:
    """Write a model folder: the components of `model` as they are, those of `components` added or in their place."""
    index = json.loads((model / "model_index.json").read_text())
    for part, kind in index.items():
        if isinstance(kind, list) and kind[0] is not None and part not in components:
            shutil.copytree(model / part, folder / part)
    for name, network in components.items():
        network.save_pretrained(folder / name, safe_serialization=True)
        index[name] = [type(network).__module__, type(network).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def model_card(steps: int, card: dict[str, Any]) -> str:
    """Markdown with the facts of `card`."""
    record = json.dumps(card, indent=2, default=str)
    return f"""---
library_name: diffusers
tags: [video-super-resolution]
---

# DUO-VSR, stage {card.get("stage", "?")}

×4 video super-resolution in {steps} step{"s" if steps > 1 else ""}. Open it with `VSRPipeline.from_pretrained`, or:

    python -m pipeline.upscale in.mp4 out.mp4 --model THIS_FOLDER

Where it comes from:

```json
{record}
```
"""


def code_version() -> str:
    """The commit of the code, or "unknown" outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        folder = Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
