"""Exponential moving average of the float32 masters, shard by shard: nothing is gathered to update it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.engine.zero_shards import Fragment


class EMA:
    """ema ← decay·ema + (1 - decay)·master after every update; starts as a copy of the masters."""

    def __init__(self, fragments: Sequence[Fragment], decay: float) -> None:
        self.decay = decay
        self._masters = [fragment.master for fragment in fragments]
        #: one float32 tensor per fragment of this rank
        self.values: list[Tensor] = [master.clone() for master in self._masters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.values, self._masters, 1 - self.decay)
