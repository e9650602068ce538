"""What a stage of training is to the loop: its networks, one step, and what it exports.

The loop (trainer/loop.py) knows no method; a stage (trainer/stages/*.py) knows no files. Every random draw of
a stage is a function of (run seed, stage, step, update, sample key), so there is no random state to save, and
a sample meets the same noise on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from common.seeding import derive_seed
from pipeline.flow_matching import shift_time

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch
    from trainer.engine.network import Network


class Stage(Protocol):
    """One stage of the method; every rank calls `train_step` with its own share of the global batches.

    Ranks that share clips (pipeline/model/sequence_parallel.py) call it with the same one.
    """

    #: base, progressive, dual_stream or preference
    name: str
    #: every network of the stage, frozen ones too; the loop saves those that have an optimizer
    networks: dict[str, Network]
    #: its EMA (its weights where it has none) becomes the model folder
    exported: Network
    #: local batches that one `train_step` consumes (updates × gradient accumulation)
    batches_per_step: int
    #: names of what `previews` shows, the exported network's first
    preview_names: tuple[str, ...]

    def train_step(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """Do all updates of step `step`; returns numbers to log, already averaged over the ranks."""
        ...

    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """The forwards, backwards and optimizer steps of `train_step`, and nothing else; `meter` takes the numbers."""
        ...

    def phase(self, step: int) -> Hashable:
        """Steps of one phase run the same passes, so they cost the same number of operations."""
        ...

    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """Clean latents (B, C, T, H, W), float32, to look at: `preview_names`.

        Every rank must call it (the weights may be sharded) with a batch of the same size.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the stage must remember beside its networks; JSON types only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Draws:
    """The random draws of one update of one batch, sample by sample."""

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


class Meter:
    """Means of named numbers over the updates of a step and over the ranks, with one reduction at the end."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._values: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor | float) -> None:
        """Note scalars; every rank notes the same names."""
        for name, value in values.items():
            scalar = torch.as_tensor(value, dtype=torch.float32, device=self._device).detach()
            self._values.setdefault(name, []).append(scalar)

    def means(self) -> dict[str, float]:
        """Collective."""
        if not self._values:
            return {}
        means = torch.stack([torch.stack(values).mean() for values in self._values.values()])
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        return dict(zip(self._values, means.tolist(), strict=True))
