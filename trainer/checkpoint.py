"""Checkpoints: everything an exact resume needs, whole or not there.

    <output>/checkpoints/step-00001000/
        state.json                          step, reader position, stage state, configuration
        <network>/rank-00000.safetensors    masters, Adam moments, EMA of one rank
    <output>/checkpoints/best.json          which of them is the best (trainer/best.py)

Written under a temporary name, renamed when every rank is done. Any number of ranks can read what any other number
wrote (trainer/engine/zero_shards.py), so there is one kind of checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from common.errors import UserError
from trainer.stages.stage import Stage


def save_checkpoint(folder: Path, step: int, stage: Stage, state: dict[str, Any]) -> Path:
    """Save `stage` after `step` steps. Collective.

    Raises:
        UserError: on every rank if any could not write (a full disk); the earlier checkpoints are untouched.
    """
    final = checkpoint_of(folder, step)
    partial = folder / f".step-{step:08d}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    failure = None
    try:
        for name, network in stage.networks.items():
            if network.fragments:
                (partial / name).mkdir(parents=True, exist_ok=True)
                network.save(partial / name)
        if dist.get_rank() == 0:
            partial.mkdir(parents=True, exist_ok=True)
            document = {"step": step, "stage": stage.name, "stage_state": stage.state_dict(), **state}
            (partial / "state.json").write_text(json.dumps(document, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        failure = str(error)
    if _any_rank(failure is not None):
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = failure or "another rank could not write"
        raise UserError(
            f"cannot save {final}: {reason}; free space and run the same command again, it goes on from "
            f"{latest_checkpoint(folder) or 'the beginning'}"
        )
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    dist.barrier()
    return final


def delete_old_checkpoints(folder: Path, keep: int, best: Path | None) -> None:
    """Delete all but the last `keep` and the best, on rank 0."""
    if dist.get_rank() == 0:
        for old in list_checkpoints(folder)[:-keep]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(checkpoint: Path, stage: Stage) -> dict[str, Any]:
    """Restore networks and stage; returns `state.json`. Collective.

    Raises:
        UserError: the checkpoint is of another stage or model.
    """
    document = read_state(checkpoint)
    if document["stage"] != stage.name:
        raise UserError(
            f"{checkpoint} is of stage {document['stage']}, not {stage.name}; choose another --output"
        )
    for name, network in stage.networks.items():
        if network.fragments:
            network.load(checkpoint / name)
    stage.load_state_dict(document["stage_state"])
    return document


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    try:
        return dict(json.loads((checkpoint / "state.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint} is not a whole checkpoint ({error}); delete it to resume from the one before"
        ) from None


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def latest_checkpoint(folder: Path) -> Path | None:
    found = list_checkpoints(folder)
    return found[-1] if found else None


def _any_rank(flag: bool) -> bool:
    value = torch.tensor([float(flag)])
    if torch.cuda.is_available():
        value = value.cuda()
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
