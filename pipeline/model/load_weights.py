"""Opening DiT weights: our model folders, Wan2.1 in diffusers layout, Wan2.1 in its original layout.

Text-to-video weights get the patch embedding widened for z_LR, its new half zero: the conditional model then starts as
exactly the model it was loaded from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError
from pipeline.model.config import TransformerConfig
from pipeline.model.transformer import VSRTransformer, widen_patch_embedding

#: original Wan2.1 names -> diffusers names, applied in order
ORIGINAL_NAMES = (
    (r"^(model\.diffusion_model|model)\.", ""),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn[12])\.q\.", r".\1.to_q."),
    (r"\.(attn[12])\.k\.", r".\1.to_k."),
    (r"\.(attn[12])\.v\.", r".\1.to_v."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    # Wan's norm3 is the one before cross-attention, diffusers' norm2; Wan's norm1 and norm2 have no weights.
    (r"\.norm3\.", ".norm2."),
)


def build_transformer(
    config: TransformerConfig, initial_weights: str | Path | None = None, *, dtype: torch.dtype | None = torch.float32
) -> VSRTransformer:
    """A DiT of the configured shape, from `initial_weights` or randomly initialised (torch's seed, float32).

    A random model with `low_resolution_skip` starts as ẑ0(t=1) = z_LR: its output projection is zero.
    """
    if initial_weights is not None:
        return load_transformer(initial_weights, config, dtype=dtype)
    model = VSRTransformer(**config.model_dump())
    if config.low_resolution_skip:
        torch.nn.init.zeros_(model.proj_out.weight)
        torch.nn.init.zeros_(model.proj_out.bias)
    return model


def load_transformer(
    folder: str | Path, config: TransformerConfig, *, dtype: torch.dtype | None = torch.float32
) -> VSRTransformer:
    """Load DiT weights. Those that the file holds in `dtype` are mapped: the processes of a machine share one copy.

    Args:
        folder: a model folder of ours, a Wan2.1 folder (diffusers or original layout), or the `transformer/` folder or
            `.safetensors` file of one.
        config: the shape that the weights must have.
        dtype: None: as in the file.

    Raises:
        UserError: nothing to load there, or weights of another shape (the names are listed).
    """
    folder = Path(folder)
    files = _weight_files(folder)
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    if not any(name.startswith("condition_embedder.") for name in state):
        state = {rename_original(name): tensor for name, tensor in state.items()}
    if "patch_embedding.weight" not in state:
        raise UserError(f"{folder} holds no DiT: patch_embedding.weight is missing in {files[0].name}")
    _require_same_kind(folder, config)
    state["patch_embedding.weight"] = widen_patch_embedding(state["patch_embedding.weight"], config.latent_channels)
    with torch.device("meta"):
        model = VSRTransformer(**config.model_dump())
    require_same_shapes(folder, state, model)
    model.rope = WanRotaryPosEmbed(  # tables that no file holds
        config.attention_head_dim, config.patch_size, model.config.rope_max_seq_len
    )
    values = state if dtype is None else {name: tensor.to(dtype) for name, tensor in state.items()}
    model.load_state_dict(values, strict=True, assign=True)
    return model


def saved_config(folder: str | Path) -> TransformerConfig:
    """The shape of a DiT that training wrote, from its config.json.

    Raises:
        UserError: no config.json there.
    """
    for candidate in (Path(folder) / "transformer" / "config.json", Path(folder) / "config.json"):
        if candidate.is_file():
            names = TransformerConfig.model_fields
            saved = json.loads(candidate.read_text())
            return TransformerConfig(**{name: value for name, value in saved.items() if name in names})
    raise UserError(f"{folder} holds no config.json of a DiT; give a model folder that training wrote")


def rename_original(name: str) -> str:
    """A parameter name of the original Wan2.1 release in diffusers' spelling."""
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _weight_files(folder: Path) -> list[Path]:
    if folder.is_file() and folder.suffix == ".safetensors":
        return [folder]
    for candidate in (folder / "transformer", folder):
        files = sorted(candidate.glob("*.safetensors"))
        if files:
            return files
    if not folder.exists():
        raise UserError(f"no model folder {folder}")
    raise UserError(
        f"{folder} holds no DiT weights (*.safetensors, in transformer/ or directly); .pth files are not read"
    )


def _require_same_kind(folder: Path, config: TransformerConfig) -> None:
    """The skip changes the meaning of the same weights, and no shape tells."""
    for candidate in (folder / "transformer" / "config.json", folder / "config.json"):
        if candidate.is_file():
            saved = json.loads(candidate.read_text())
            ours = saved.get("_class_name") == "VSRTransformer"
            for name, absent in (
                ("low_resolution_skip", False),
                ("low_resolution_deviation", 0.0),
                ("low_resolution_predictor", False),
                ("residual_input", False),
            ):
                found = saved.get(name, absent)
                if ours and found != getattr(config, name):
                    raise UserError(f"{candidate} says {name}: {found}; set model.transformer.{name} to the same")
            return


def require_same_shapes(folder: Path, state: dict[str, Tensor], model: VSRTransformer) -> None:
    """
    Raises:
        UserError: names or shapes of `state`, read from `folder`, are not the model's.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is unknown" for name in found if name not in wanted]
    faults += [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise UserError(f"{folder} does not fit model.transformer: {shown}")
