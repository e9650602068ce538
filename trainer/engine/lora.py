"""LoRA by peft: a network's large matrices stay as they are, each with two thin ones that learn beside it.

    y = W·x + (alpha/rank)·B·A·x        W (out, in) frozen; A (rank, in) random; B (out, rank), zero to begin with

The adapter's parameters, and those of `trained_modules`, are all that has gradients, masters, moments, an EMA and a
place in checkpoints. What a stage leaves behind is merged: a whole model, for which nobody needs
peft. The adapter lies beside it in peft's own format.

peft is imported where it is used: it takes seconds, and most runs have no adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from common.atomic import atomic_folder
from common.config import Section
from common.errors import UserError
from common.seeding import derive_seed
from pipeline.model.transformer import VSRTransformer

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

#: what peft calls the only adapter; it is part of parameter names
ADAPTER = "default"


class LoRAConfig(Section):
    """The adapter of one network."""

    rank: int = Field(default=64, ge=1)  # [peer: LightX2V's step distillation of Wan2.1]
    #: the product is scaled by alpha/rank; null = rank, that is by 1 [peer: diffusers' training scripts]
    alpha: float | None = Field(default=None, gt=0)
    #: linear layers with an adapter, each the end of a name: attention and FFN of every block [peer: LightX2V's too]
    target_modules: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"), min_length=1
    )
    #: modules that learn whole, by their full names: where z_LR enters (zero in text-to-video weights, so no thin
    #: correction would do) and where the velocity leaves [ours]
    trained_modules: tuple[str, ...] = ("patch_embedding", "proj_out")

    def as_peft(self, *, whole_modules: bool = False) -> LoraConfig:
        """peft's configuration; `whole_modules` names `trained_modules` too, for a `PeftModel`, which copies them."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            target_modules=list(self.target_modules),
            lora_dropout=0.0,
            bias="none",
            modules_to_save=list(self.trained_modules) if whole_modules else None,
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
        inject_adapter_in_model(config.as_peft(), transformer, ADAPTER)  # freezes all but the adapter
    for name in config.trained_modules:
        transformer.get_submodule(name).requires_grad_(True)


def add_adapter_like(transformer: VSRTransformer, other: nn.Module) -> None:
    """Give `transformer` untrained layers of the names and shapes that `other`'s adapter has, if it has one."""
    from peft import inject_adapter_in_model

    if hasattr(other, "peft_config"):
        inject_adapter_in_model(other.peft_config[ADAPTER], transformer, ADAPTER)


def restore_adapter(
    transformer: VSRTransformer,
    config: LoRAConfig,
    trained: dict[str, Tensor],
    base: Path | str | None = None,
) -> PeftModel:
    """`transformer`, as it was before training, with what training made of the adapter and of `trained_modules`.

    Args:
        trained: `Network.full_state_dict()`, float32.
        base: where the weights of `transformer` are from; the adapter's files will say so.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapter = config.as_peft(whole_modules=True)
    model = get_peft_model(transformer, adapter, ADAPTER)
    adapter.base_model_name_or_path = None if base is None else str(base)
    state = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value for name, value in trained.items()
    }
    strange = state.keys() ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if strange:
        raise ValueError(f"not this adapter's weights: {min(strange)}")
    set_peft_model_state_dict(model, state, ADAPTER)
    return model


def save_adapter(folder: Path, model: PeftModel) -> None:
    """Write adapter_config.json and adapter_model.safetensors, whole or not at all.

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
            known = [
                name for name, child in transformer.named_children() if any(True for _ in child.parameters())
            ]
            raise UserError(
                f"{field}: {trained!r} names no module with weights; give whole names: {', '.join(known)}, "
                "or of parts of them (blocks.0.norm2)"
            )
        inside = [name for name in adapted if f"{name}.".startswith(f"{trained}.")]
        if inside:
            raise UserError(
                f"{field}: {trained!r} learns whole, but {inside[0]} in it has an adapter; name it in one of "
                "target_modules and trained_modules"
            )
