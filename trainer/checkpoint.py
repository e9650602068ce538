"""Checkpoints: everything an exact resume needs, written atomically.

    <output>/checkpoints/step-00001000/
        state.json                          step, reader position, configuration
        <network>/rank-00000.safetensors    masters, Adam moments, EMA of one rank
    <output>/checkpoints/best.json    {"number": "validation/student/psnr", "step": 1000, "value": 31.2}

A checkpoint is written under a temporary name and renamed when every rank is done. Any number of ranks can read what
any other number wrote (trainer/engine/zero_shards.py). The best checkpoint by a number of the validation is kept beside
the last ones. What decides is part of state.json, so a resumed run chooses as the uninterrupted one would have;
best.json repeats it for people, scripts and `--export best`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from common.atomic import write_atomic
from common.errors import UserError
from trainer.stages.stage import TrainingStage


def save_checkpoint(folder: Path, step: int, stage: TrainingStage, state: dict[str, Any]) -> Path:
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
            document = {"step": step, "stage": stage.name, **state}
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


def load_checkpoint(checkpoint: Path, stage: TrainingStage) -> dict[str, Any]:
    """Restore the networks; returns `state.json`. Collective.

    Raises:
        UserError: the checkpoint is of another stage or model.
    """
    document = read_state(checkpoint)
    if document["stage"] != stage.name:
        raise UserError(f"{checkpoint} is of stage {document['stage']}, not {stage.name}; choose another --output")
    for name, network in stage.networks.items():
        if network.fragments:
            network.load(checkpoint / name)
    return document


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    try:
        return dict(json.loads((checkpoint / "state.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint} is not a complete checkpoint ({error}); delete it to resume from the one before"
        ) from None


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def latest_checkpoint(folder: Path) -> Path | None:
    found = list_checkpoints(folder)
    return found[-1] if found else None


#: numbers of a preview that can decide, and whether more of them is better
HIGHER_IS_BETTER = {"psnr": True, "latent_mse": False}


class Best:
    """Which checkpoint of a run is the best so far. Every rank holds the same."""

    def __init__(self, folder: Path, stage: TrainingStage, number: str | None) -> None:
        """
        Args:
            folder: of the run's checkpoints.
            number: a key of `HIGHER_IS_BETTER`, of the exported network's preview; None: no checkpoint is the best.
        """
        self._folder = folder
        self._sign = 1 if number is None or HIGHER_IS_BETTER[number] else -1
        self._number = None if number is None else f"validation/{stage.preview_names[0]}/{number}"
        self._step: int | None = None
        self._value = -self._sign * math.inf

    def improved(self, step: int, values: dict[str, float]) -> bool:
        """Whether a validation after `step` steps is the best so far; if so, its checkpoint is the best from now on."""
        if self._number is None:
            return False
        value = values[self._number]
        if not self._sign * value > self._sign * self._value:  # not a number is no improvement
            return False
        self._step, self._value = step, value
        return True

    @property
    def checkpoint(self) -> Path | None:
        """Where it is, or will be once it is saved."""
        return None if self._step is None else checkpoint_of(self._folder, self._step)

    def state_dict(self) -> dict[str, Any]:
        """JSON types; empty while there is none."""
        if self._step is None:
            return {}
        return {"number": self._number, "step": self._step, "value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Forgets what another number chose, or what is no longer there."""
        if state and state["number"] == self._number and checkpoint_of(self._folder, state["step"]).exists():
            self._step, self._value = state["step"], state["value"]

    def write(self) -> None:
        """Make best.json say the same, on rank 0."""
        if self._step is None or dist.get_rank() != 0:
            return
        write_atomic(self._folder / "best.json", json.dumps(self.state_dict()) + "\n")


def load_best(checkpoints: Path, stage: TrainingStage) -> dict[str, float]:
    """Give the exported network the weights of the best checkpoint; returns its validation metrics. Collective.

    Raises:
        UserError: there is none: every validation's number was not finite.
    """
    try:
        step = json.loads((checkpoints / "best.json").read_text())["step"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"--export best: {checkpoints} has no best.json, as no validation gave a finite number; "
            "--export last exports the last weights"
        ) from None
    checkpoint = checkpoint_of(checkpoints, step)
    (name,) = [name for name, network in stage.networks.items() if network is stage.exported]
    stage.exported.load(checkpoint / name)
    return dict(read_state(checkpoint)["metrics"])


def _any_rank(flag: bool) -> bool:
    value = torch.tensor([float(flag)])
    if torch.cuda.is_available():
        value = value.cuda()
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
