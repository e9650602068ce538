"""The best checkpoint of a run by a number of its validation, kept beside the last ones.

    <output>/checkpoints/best.json    {"number": "validation/student/psnr", "step": 1000, "value": 31.2}

What decides is remembered inside the checkpoints (state.json), so a resumed run chooses as the uninterrupted one would
have. best.json repeats it for people, scripts and `--export best`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from common.errors import UserError
from trainer.checkpoint import checkpoint_of, read_state
from trainer.stages.stage import Stage

if TYPE_CHECKING:
    from trainer.config import ScheduleConfig
    from trainer.loop import Run

#: numbers of a preview that can decide, and whether more of them is better
HIGHER_IS_BETTER = {"psnr": True, "latent_mse": False}


class Best:
    """Which checkpoint of a run is the best so far. Every rank holds the same."""

    def __init__(self, folder: Path, stage: Stage, number: str | None) -> None:
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
        temporary = self._folder / ".best.json.partial"
        temporary.write_text(json.dumps(self.state_dict()) + "\n")
        os.replace(temporary, self._folder / "best.json")


def check_kept(stage: str, schedule: ScheduleConfig) -> None:
    """Fail early where there will be no best checkpoint to export.

    Raises:
        UserError: the configuration keeps none.
    """
    for field in ("validate_every", "keep_best"):
        if not getattr(schedule, field):
            raise UserError(
                f"--export best: no best checkpoint is kept, as trainer.schedules.{stage}.{field} is "
                f"{'0' if field == 'validate_every' else 'null'}"
            )


def load_best(run: Run) -> None:
    """Give the exported network the weights, and the run the metrics, of its best checkpoint. Collective.

    Raises:
        UserError: there is none: every validation's number was not finite.
    """
    try:
        step = json.loads((run.checkpoints / "best.json").read_text())["step"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"--export best: {run.checkpoints} has no best.json, as no validation gave a finite number; "
            "--export last exports the last weights"
        ) from None
    checkpoint = checkpoint_of(run.checkpoints, step)
    (name,) = [name for name, network in run.stage.networks.items() if network is run.stage.exported]
    run.stage.exported.load(checkpoint / name)
    run.metrics = read_state(checkpoint)["metrics"]
