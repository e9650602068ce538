"""The output folder of a run: one owner, nothing begun again in silence, no leftovers.

OUTPUT/run.json        the stage, and the last checkpoint that was saved: distinguishes a lost one from none so far
OUTPUT/.lock           held by rank 0 while it trains; .lock.json says by which host, process and job
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from common.atomic import write_atomic
from common.errors import UserError
from common.locking import only_writer
from trainer.checkpoint import list_checkpoints
from trainer.engine.process_group import from_rank_0

#: what `--restart` sets aside
KEPT = ("checkpoints", "metrics.jsonl", "previews", "model", "teacher", "adapter", "run.json", "wandb-id")


@contextmanager
def owned(output: Path, *, restart: bool = False) -> Iterator[None]:
    """Hold the output folder for the duration of the block. Collective.

    Args:
        restart: set what is there aside, into OUTPUT/before-restart-N, and begin at step 0. A job that SLURM has
            requeued with the same command goes on instead.

    Raises:
        UserError: on every rank: another process trains into it, or its checkpoints are gone.
    """
    with ExitStack() as stack:
        fault = None
        if dist.get_rank() == 0:
            try:
                stack.enter_context(only_writer(output))
                _prepare(output, restart and not int(os.environ.get("SLURM_RESTART_COUNT", "0")))
            except UserError as error:
                fault = str(error)
        if (fault := from_rank_0(fault)) is not None:
            raise UserError(fault)
        yield


def record_checkpoint(output: Path, stage: str, checkpoint: Path) -> None:
    """Note on rank 0 that there has been a checkpoint."""
    if dist.get_rank() == 0:
        write_atomic(output / "run.json", json.dumps({"stage": stage, "last_checkpoint": checkpoint.name}) + "\n")


def _prepare(output: Path, restart: bool) -> None:
    if restart:
        _set_aside(output)
    for leftover in (output / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        last = json.loads((output / "run.json").read_text())["last_checkpoint"]
    except (OSError, ValueError, KeyError):
        return
    found = [path.name for path in list_checkpoints(output / "checkpoints")]
    if not found:
        raise UserError(
            f"{output / 'checkpoints'}: its checkpoints are gone, {last} was the last one. Restore it, or begin again "
            "at step 0 with --restart, which keeps the old log"
        )
    if last not in found:
        print(f"{output / 'checkpoints' / last} is gone: an earlier checkpoint is used", flush=True)


def _set_aside(output: Path) -> None:
    there = [output / name for name in KEPT if (output / name).exists()] + sorted(output.glob("bad-steps-rank-*.txt"))
    if not there:
        return
    number = 1 + len(list(output.glob("before-restart-*")))
    kept = output / f"before-restart-{number}"
    kept.mkdir()
    for path in there:
        os.replace(path, kept / path.name)
    print(f"begins again at step 0; what was there is kept in {kept}", flush=True)
