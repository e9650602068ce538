"""Where numbers and pictures of a run go: `metrics.jsonl` and `previews/` always, wandb if wanted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from common.atomic import write_atomic
from common.errors import UserError
from trainer.config import TrackingConfig


class Tracker:
    """Rank 0's log; other ranks have none."""

    def __init__(self, config: TrackingConfig, output: Path, name: str, settings: dict[str, Any], start: int) -> None:
        """
        Args:
            output: folder of the run.
            name: shown in wandb.
            settings: the resolved configuration, recorded with the run.
            start: first step of this process; later lines of an interrupted run are dropped from metrics.jsonl.
        """
        self._path = output / "metrics.jsonl"
        self._images = output / "previews"
        self._keep_before(start)
        self._file = self._path.open("a", buffering=1)
        self._run = None
        if config.wandb != "off":
            import wandb

            if config.wandb == "online" and wandb.api.api_key is None:
                raise UserError(
                    "trainer.tracking.wandb is online, but no wandb account is known here: run `wandb login`, or set "
                    "it to offline (`wandb sync` uploads later) or off"
                )
            os.environ.setdefault("WANDB_SILENT", "true")
            self._run = wandb.init(
                project=config.project, name=name, dir=output, config=settings, mode=config.wandb,
                id=_run_id(output), resume="allow",
            )  # fmt: skip

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of numbers."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._run is not None:
            self._run.log(values, step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Save a picture as `previews/<name>-<step>.png`."""
        self._images.mkdir(exist_ok=True)
        path = self._images / f"{name}-{step:08d}.png"
        image.save(path)
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._file.close()
        if self._run is not None:
            self._run.finish()

    def _keep_before(self, start: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] < start:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # the last line of a killed run may be cut short
        write_atomic(self._path, "".join(line + "\n" for line in kept))


def _run_id(output: Path) -> str:
    """The same wandb run after a restart, without asking wandb."""
    path = output / "wandb-id"
    if not path.exists():
        path.write_text(os.urandom(8).hex())
    return path.read_text()
