"""Where each parameter's float32 master and Adam moments lie on this rank, whatever the ZeRO stage.

ZeRO keeps flat buffers; a fragment names one piece: elements [start, start + numel) of the flattened
parameter `name`. Fragments make three things simple and exact: an EMA that never gathers, checkpoints that
another number of ranks can read, and an export that gathers one parameter at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError

#: Adam's moments, as torch names them
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A piece of parameter `name` on this rank; `flat` is ZeRO's buffer that holds it from `offset` on."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    @property
    def master(self) -> Tensor:
        """(numel,) float32 view: writing to it changes the master weights."""
        return self.view_of(self.flat)

    def view_of(self, flat: Tensor) -> Tensor:
        """The same piece of a buffer laid out like `flat` (a moment)."""
        return flat.detach().narrow(0, self.offset, self.numel)


def gather_to_rank_0(
    shapes: dict[str, torch.Size], fragments: Sequence[Fragment], values: Sequence[Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Assemble full float32 CPU tensors from every rank's `values` (one per fragment), one by one.

    Collective: all ranks call it; ranks other than 0 get an empty dictionary.
    """
    mine = {fragment.name: (fragment, value) for fragment, value in zip(fragments, values, strict=True)}
    full: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        gathered = torch.zeros(shape.numel(), dtype=torch.float32, device=device)
        if name in mine:
            fragment, value = mine[name]
            gathered[fragment.start : fragment.start + fragment.numel] = value.to(device)
        # Every element is held by exactly one rank, so this sum only adds zeros: it is exact.
        dist.reduce(gathered, dst=0)
        if dist.get_rank() == 0:
            full[name] = gathered.reshape(shape).cpu()
    return full


def save_fragments(
    path: Path, fragments: Sequence[Fragment], columns: dict[str, Sequence[Tensor]], state: dict[str, Any]
) -> None:
    """Write this rank's values as safetensors, `state` (JSON) in its metadata.

    Args:
        columns: for each kind ("master", "ema", …) one tensor per fragment.
    """
    tensors = {
        f"{kind}/{fragment.start}/{fragment.name}": value.detach().cpu().contiguous()
        for kind, values in columns.items()
        for fragment, value in zip(fragments, values, strict=True)
    }
    save_file(tensors, path, metadata={"state": json.dumps(state)})


def load_fragments(folder: Path, fragments: Sequence[Fragment], columns: dict[str, Sequence[Tensor]]) -> dict[str, Any]:
    """Fill the tensors of `columns` in place from files that any number of ranks wrote; returns their state.

    Raises:
        UserError: when the files don't hold every element asked for.
    """
    paths = sorted(folder.glob("rank-*.safetensors"))
    if not paths:
        raise UserError(f"{folder} holds no rank-*.safetensors: it is not a checkpoint of a network")
    files = [safe_open(path, framework="pt", device="cpu") for path in paths]
    if len(files) != (written := json.loads(files[0].metadata()["state"])["world_size"]):
        raise UserError(f"{folder} holds {len(files)} of {written} rank files: the checkpoint is incomplete")
    pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
    for file in files:
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            kind, start, name = key.split("/", 2)
            pieces.setdefault((kind, name), []).append((int(start), file, key))
    for kind, values in columns.items():
        for fragment, value in zip(fragments, values, strict=True):
            if _fill(value, fragment, pieces.get((kind, fragment.name), [])) != fragment.numel:
                raise UserError(f"{folder} lacks {kind} of {fragment.name}: another model or configuration wrote it")
    return dict(json.loads(files[0].metadata()["state"]))


def _fill(value: Tensor, fragment: Fragment, pieces: list[tuple[int, Any, str]]) -> int:
    """Copy what overlaps; returns the number of elements copied."""
    end, copied = fragment.start + fragment.numel, 0
    for start, file, key in pieces:
        stored = file.get_slice(key)
        low, high = max(start, fragment.start), min(start + stored.get_shape()[0], end)
        if low < high:
            value[low - fragment.start : high - fragment.start].copy_(stored[low - start : high - start])
            copied += high - low
    return copied
