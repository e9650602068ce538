"""Checkpoints: everything an exact resume needs, written atomically.

    <output>/checkpoints/step-00001000/
        state.json                          step, reader position, configuration, SHA-256 of every other file
        <network>/rank-00000.safetensors    masters, Adam moments, EMA of one rank
    <output>/checkpoints/best.json    {"number": "validation/student/psnr", "step": 1000, "value": 31.2}

A checkpoint is written under a temporary name, flushed to the disk by every rank and renamed when all are done. Before
it is read, all of its files are compared with their SHA-256; one that is damaged is set aside as step-N.damaged, with a
line that names the file, and the one before it is used. Any number of ranks can read what any other number wrote
(trainer/engine/zero_shards.py). The best checkpoint by a number of the validation is kept beside
the last ones. What decides is part of state.json, so a resumed run chooses as the uninterrupted one would have;
best.json repeats it for people, scripts and `--export best`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from common.atomic import fsync, publish_folder, write_atomic
from common.errors import UserError
from common.fingerprint import file_sha256
from trainer.engine.process_group import from_rank_0, gathered
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
    failure, mine = None, {}
    try:
        for name, network in stage.networks.items():
            if network.fragments:
                (partial / name).mkdir(parents=True, exist_ok=True)
                written = network.save(partial / name)
                fsync(written)
                mine[f"{name}/{written.name}"] = file_sha256(written)
    except (OSError, SafetensorError) as error:
        failure = str(error)
    files = dict(sorted(pair for part in gathered(mine) for pair in part.items()))
    failure = next((fault for fault in gathered(failure) if fault is not None), None)
    if failure is None and dist.get_rank() == 0:
        frozen = {name: network.constants for name, network in stage.networks.items() if not network.fragments}
        document = {"step": step, "stage": stage.name, **state, "frozen": frozen, "files": files}
        try:
            partial.mkdir(parents=True, exist_ok=True)
            (partial / "state.json").write_text(json.dumps(document, indent=2) + "\n")
            publish_folder(partial, final)
        except OSError as error:
            failure = str(error)
    if (failure := from_rank_0(failure)) is not None:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot save {final}: {failure}; free space and run the same command again, it goes on from "
            f"{latest_checkpoint(folder) or 'the beginning'}"
        )
    return final


def delete_old_checkpoints(folder: Path, keep: int, best: Path | None) -> None:
    """Delete all but the last `keep` and the best, on rank 0."""
    if dist.get_rank() == 0:
        for old in list_checkpoints(folder)[:-keep]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)


def choose_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is intact, None where there has been none; rank 0's listing decides. Collective.

    Raises:
        UserError: there are checkpoints, but all of them are damaged.
    """
    names = from_rank_0([path.name for path in list_checkpoints(folder)])
    for name in reversed(names):
        checkpoint = folder / name
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        if dist.get_rank() == 0:
            kept = checkpoint.with_name(f"{name}.damaged")
            shutil.rmtree(kept, ignore_errors=True)
            os.replace(checkpoint, kept)
            print(f"WARNING: {fault}; set aside as {kept.name}", flush=True)
    if names:
        raise UserError(f"{folder}: no intact checkpoint is left, see above; begin again at step 0 with --restart")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, one line; None if they are as they were written. Collective.

    Every rank compares its share of the files; rank 0's state.json says what was written.
    """
    files: dict[str, str] = {}
    fault = None
    if dist.get_rank() == 0:
        try:
            files = read_state(checkpoint).get("files", {})
        except UserError as error:
            fault = str(error)
    for name, expected in sorted(from_rank_0(files).items())[dist.get_rank() :: dist.get_world_size()]:
        path = checkpoint / name
        try:
            if file_sha256(path) != expected:
                fault = f"{path} is damaged: {path.stat().st_size} bytes with another SHA-256 than was written"
        except OSError as error:
            fault = f"{path} cannot be read: {error.strerror}"
    return next((found for found in gathered(fault) if found is not None), None)


def load_checkpoint(checkpoint: Path, stage: TrainingStage, settings: dict[str, Any]) -> dict[str, Any]:
    """Restore the networks; returns `state.json`. Collective.

    Args:
        settings: of this run; its `parents` are named where a frozen network is another than before.

    Raises:
        UserError: the checkpoint is of another stage or model, or was trained beside other frozen networks.
    """
    document = read_state(checkpoint)
    if document["stage"] != stage.name:
        raise UserError(f"{checkpoint} is of stage {document['stage']}, not {stage.name}; choose another --output")
    if (fault := from_rank_0(_other_frozen_network(checkpoint, document, stage, settings))) is not None:
        raise UserError(fault)
    for name, network in stage.networks.items():
        if network.fragments:
            network.load(checkpoint / name)
    return document


def _other_frozen_network(
    checkpoint: Path, document: dict[str, Any], stage: TrainingStage, settings: dict[str, Any]
) -> str | None:
    """Which frozen network has other weights than when the checkpoint was written; rank 0 knows."""
    for name, expected in document.get("frozen", {}).items():
        network = stage.networks.get(name)
        if network is not None and network.constants not in (None, expected):
            option = stage.spec.network(name).weights
            before, now = (
                each.get("parents", {}).get(option, "none") for each in (document.get("settings", {}), settings)
            )
            return (
                f"{checkpoint} was trained beside other weights of {name}: --{option} was {before}, now it is {now}. "
                "Give the folder it was, unchanged, or choose another --output"
            )
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    try:
        return dict(json.loads((checkpoint / "state.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint ({error})") from None


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; only exact names count."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


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


def has_best(checkpoints: Path) -> bool:
    """Whether a validation has chosen one."""
    return (checkpoints / "best.json").exists()


def load_best(checkpoints: Path, stage: TrainingStage) -> dict[str, float]:
    """Give the networks that are exported the weights of the best checkpoint; returns its metrics. Collective.

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
    if (fault := damage(checkpoint)) is not None:
        raise UserError(f"--export best: {fault}; --export last exports the last weights")
    for name, network in stage.networks.items():
        if network.ema is not None:
            network.load(checkpoint / name)
    return dict(read_state(checkpoint)["metrics"])
