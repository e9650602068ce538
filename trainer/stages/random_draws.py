"""The random draws of training: functions of (run seed, stage, step, update, sample key, purpose).

There is no random state to save, and a sample meets the same noise on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.seeding import derive_seed
from pipeline.flow_matching import shift_time


class Draws:
    """The draws of one update of one batch, sample by sample."""

    def __init__(self, keys: Sequence[str], *identity: object, device: torch.device | str = "cpu") -> None:
        """`identity` is (run seed, stage, step, update); `keys` name the samples of the batch."""
        self._keys = list(keys)
        self._identity = identity
        self._device = device

    def noise(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of `like`, (B, ...), float32."""
        shape = like.shape[1:]
        rows = [torch.randn(shape, generator=self._generator(purpose, key)) for key in self._keys]
        return torch.stack(rows).to(self._device)

    def uniform(self, purpose: str) -> Tensor:
        """U(0, 1), shape (B,), float32."""
        rows = [torch.rand((), generator=self._generator(purpose, key)) for key in self._keys]
        return torch.stack(rows).to(self._device)

    def times(self, purpose: str, *, shift: float, low: float, high: float) -> Tensor:
        """t ~ U(0, 1), shifted, clamped to [low, high]; shape (B,), float32."""
        return shift_time(self.uniform(purpose), shift).clamp(low, high)

    def _generator(self, purpose: str, key: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(*self._identity, purpose, key))
