"""Preemption: SIGTERM and SIGUSR1 ask for a checkpoint; all ranks agree on the step after which it is saved."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from trainer.engine.process_group import World

#: exit status after a signal was answered with a checkpoint: run the same command again (the SLURM launchers do)
EXIT_SAVED_ON_SIGNAL = 85


class StopSignal:
    """Notes SIGTERM and SIGUSR1 (SLURM's warning before preemption) until `restore`."""

    def __init__(self) -> None:
        self._asked = False
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def requested(self, world: World) -> bool:
        """Whether any rank was asked to stop. Collective."""
        flag = torch.tensor([float(self._asked)], device=world.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
