"""LoRA by peft: a network's large matrices stay as they are, each with two thin trainable ones beside it.

    y = W·x + (alpha/rank)·B·A·x        W (out, in) frozen; A (rank, in) random; B (out, rank), zero to begin with

The adapter's parameters, and those of `trained_modules`, are all that has gradients, masters, moments, an EMA and a
place in checkpoints. What a stage leaves behind is merged: a complete model, for which nobody needs
peft. The adapter lies beside it in peft's own format.

peft is imported where it is used: it takes seconds, and most runs have no adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.atomic import atomic_folder
from common.errors import UserError
from common.seeding import derive_seed
from pipeline.model.transformer import VSRTransformer
from trainer.engine.config import LoRAConfig

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

#: what peft calls the only adapter; it is part of parameter names
ADAPTER = "default"


def peft_config(config: LoRAConfig, *, trained_modules: bool = False) -> LoraConfig:
    """peft's configuration; with `trained_modules` also those modules, for a `PeftModel`, which copies them."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]
        target_modules=list(config.target_modules),
        lora_dropout=0.0,
        bias="none",
        modules_to_save=list(config.trained_modules) if trained_modules else None,
    )


def add_adapter(transformer: VSRTransformer, config: LoRAConfig, *, network: str, seed: int) -> None:
    """Freeze `transformer` but for a new adapter and `trained_modules`; its function stays the same for now.

    Args:
        network: student or critic, for the errors; the draws of A depend on it.
        seed: run seed; equal seeds give equal adapters, on every rank.

    Raises:
        UserError: a module of the configuration is not there, or not of a kind that can have an adapter.
    """
    from peft import inject_adapter_in_model

    _check(transformer, config, network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora", network))
        inject_adapter_in_model(peft_config(config), transformer, ADAPTER)  # freezes all but the adapter
    for name in config.trained_modules:
        transformer.get_submodule(name).requires_grad_(True)


def add_adapter_like(transformer: VSRTransformer, other: nn.Module) -> None:
    """Give `transformer` untrained layers of the names and shapes that `other`'s adapter has, if it has one."""
    if hasattr(other, "peft_config"):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(other.peft_config[ADAPTER], transformer, ADAPTER)


def restore_adapter(
    transformer: VSRTransformer, config: LoRAConfig, trained: dict[str, Tensor], base: Path | str | None = None
) -> PeftModel:
    """`transformer`, as it was before training, with what training made of the adapter and of `trained_modules`.

    Args:
        trained: `Network.full_state_dict()`, float32.
        base: where the weights of `transformer` are from; the adapter's files will say so.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapter = peft_config(config, trained_modules=True)
    model = get_peft_model(transformer, adapter, ADAPTER)
    adapter.base_model_name_or_path = None if base is None else str(base)
    state = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value for name, value in trained.items()}
    strange = state.keys() ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if strange:
        raise ValueError(f"not this adapter's weights: {min(strange)}")
    set_peft_model_state_dict(model, state, ADAPTER)
    return model


def save_adapter(folder: Path, model: PeftModel) -> None:
    """Write adapter_config.json and adapter_model.safetensors, atomically.

    Raises:
        UserError: they cannot be written (a full disk); an older adapter is untouched.
    """
    with atomic_folder(folder) as partial:
        # No embedding layers: to find out whether there are any, peft would look up the base model on the Hub.
        model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)  # peft's form with nothing filled in


def merged_state(model: PeftModel) -> dict[str, Tensor]:
    """W + (alpha/rank)·B·A under the plain transformer's names; `model` is used up."""
    merged: Any = model.merge_and_unload()
    return dict(merged.state_dict())


def _check(transformer: VSRTransformer, config: LoRAConfig, network: str) -> None:
    modules = dict(transformer.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    field = f"trainer.lora.{network}.target_modules"
    adapted = []
    for target in config.target_modules:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found or not set(found) <= set(linear):
            reason = f"{found[0]} is not a linear layer" if found else "no module's name ends like that"
            known = sorted({name.split(".", 2)[2] for name in linear if name.startswith("blocks.")})
            raise UserError(f"{field}: {target!r}: {reason}; a block's linear layers are {', '.join(known)}")
        adapted += found
    field = f"trainer.lora.{network}.trained_modules"
    for trained in config.trained_modules:
        if trained not in modules or not any(True for _ in modules[trained].parameters()):
            known = [name for name, child in transformer.named_children() if any(True for _ in child.parameters())]
            raise UserError(
                f"{field}: {trained!r} names no module with weights; give full names: {', '.join(known)}, "
                "or of parts of them (blocks.0.norm2)"
            )
        inside = [name for name in adapted if f"{name}.".startswith(f"{trained}.")]
        if inside:
            raise UserError(
                f"{field}: {trained!r} is fully trainable, but {inside[0]} in it has an adapter; name it in one of "
                "target_modules and trained_modules"
            )
