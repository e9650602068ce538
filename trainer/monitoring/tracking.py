"""Where numbers and images of a run go: `metrics.jsonl` and `previews/` always, wandb if wanted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from common.atomic import write_atomic
from common.errors import UserError
from trainer.config import TrackingConfig


class Tracker:
    """Rank 0's log; other ranks have none.

    Logging never ends a run. metrics.jsonl is the record: what cannot be written to it (a full disk) is counted and
    left out, and wandb is given up at its first error, for instance when its service was ended by the signal that asks
    the run to save.
    """

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
        self._lost = 0
        self._keep_before(start)
        self._run: Any = None
        if config.wandb != "off":
            self._run = self._quietly("starts no run", lambda: _wandb_run(config, output, name, settings, start))

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of numbers."""
        self._append(json.dumps({"step": step, **values}) + "\n")
        if self._run is not None:
            self._quietly("takes no numbers", lambda: self._run.log(values, step=step))

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Save an image as `previews/<name>-<step>.png`."""
        path = self._images / f"{name}-{step:08d}.png"
        try:
            self._images.mkdir(exist_ok=True)
            image.save(path)
        except OSError as error:
            print(f"WARNING: cannot write {path}: {error.strerror}; training goes on", flush=True)
            path.unlink(missing_ok=True)
            return
        if self._run is not None:
            import wandb

            self._quietly("takes no images", lambda: self._run.log({name: wandb.Image(str(path))}, step=step))

    def close(self) -> None:
        """End wandb's run; says how many lines of metrics.jsonl were lost."""
        if self._lost:
            print(f"WARNING: {self._path} lacks {self._lost} lines that could not be written", flush=True)
        if self._run is not None:
            self._quietly("does not finish", lambda: self._run.finish())

    def _append(self, line: str) -> None:
        """Append one line atomically: half a line would make the next one unreadable."""
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.write(line)
        except OSError as error:
            if not self._lost:
                print(f"WARNING: cannot write {self._path}: {error.strerror}; training goes on", flush=True)
            self._lost += 1
            with suppress(OSError):
                os.truncate(self._path, size)

    def _quietly(self, what: str, call: Callable[[], Any]) -> Any:
        """`call()`; at an error, wandb is given up."""
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            print(
                f"WARNING: wandb {what} ({type(error).__name__}: {first}); {self._path} goes on",
                file=sys.stderr,
                flush=True,
            )
            self._run = None
            return None

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


def _wandb_run(config: TrackingConfig, output: Path, name: str, settings: dict[str, Any], start: int) -> Any:
    """The run that goes on online; offline a run of its own in the group, or syncing one would hide the others.

    Raises:
        UserError: online without an account.
    """
    import wandb

    if config.wandb == "online" and wandb.api.api_key is None:
        raise UserError(
            "trainer.tracking.wandb is online, but no wandb account is known here: run `wandb login`, or set "
            "it to offline (`wandb sync` uploads later) or off"
        )
    os.environ.setdefault("WANDB_SILENT", "true")
    group = _group(output)
    identity: dict[str, Any] = {"id": group, "resume": "allow"}
    if config.wandb == "offline":
        identity = {"id": f"{group}-{start}-{os.urandom(2).hex()}", "group": group}
        name = f"{name} from step {start}" if start else name
    return wandb.init(project=config.project, name=name, dir=output, config=settings, mode=config.wandb, **identity)


def _group(output: Path) -> str:
    """The same after a restart, without asking wandb."""
    path = output / "wandb-id"
    if not path.exists():
        write_atomic(path, os.urandom(8).hex())
    return path.read_text()
