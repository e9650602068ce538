"""What a degradation operation is: its configuration, its draw, its application and its description, in one class.

A drawn operation is a plain dictionary (`{"op": "noise", "kind": "gaussian", "sigma": [...]}`), which goes into the
sample's metadata as it is; lists hold one value per frame. Applying takes a list of frames, BGR uint8 (H, W, 3), whose
sizes may differ, since the resize factor walks from frame to frame.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import AfterValidator, Field

from common.config import Section

Drawn = dict[str, Any]
Frames = list[np.ndarray]


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"a range runs from low to high, not from {value[0]} to {value[1]}")
    return value


#: low to high
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Probability = Annotated[float, Field(ge=0, le=1)]


class HrShape(NamedTuple):
    """Shape of the HR clip that is degraded."""

    frames: int
    height: int
    width: int


class Operation(ABC):
    """One operation; it has no state.

    LR is a pure function of (HR clip, seed, recipe): `draw` and `apply` are random through the `rng` given and in no
    other way.
    """

    #: what `op` in the record says
    name: ClassVar[str]
    #: class of its ranges in a recipe
    config: ClassVar[type[Section]]

    @abstractmethod
    def draw(self, config: Any, shape: HrShape, rng: np.random.Generator) -> Drawn | None:
        """One draw, JSON types, without `op`; None: the clip goes without it."""

    @abstractmethod
    def apply(self, drawn: Drawn, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
        """The clip after the operation.

        Args:
            frames: BGR uint8 (H, W, 3) each.
            target: (height, width) of the LR clip.
        """

    def describe(self, drawn: Drawn) -> str:
        """One line for people: what was chosen, and means of what walks over the frames."""
        words = [self.name, *(value for key, value in drawn.items() if isinstance(value, str) and key != "op")]
        means = [f"{key} {np.mean(value):.3g}" for key, value in drawn.items() if isinstance(value, list)]
        return " ".join([*words, ", ".join(means)]).strip().replace("_", " ")


def walk(
    rng: np.random.Generator, limits: tuple[float, float], step: float, frames: int, start: float | None = None
) -> np.ndarray:
    """(F,) values: uniform in `limits` at first (or `start`), then adding U(-step, step) per frame, clipped."""
    values = np.empty(frames)
    values[0] = rng.uniform(*limits) if start is None else start
    for index, change in enumerate(rng.uniform(-step, step, frames - 1), start=1):
        values[index] = np.clip(values[index - 1] + change, *limits)
    return values


def choose(rng: np.random.Generator, weights: dict[Any, float]) -> Any:
    """A key of `weights`, drawn with its weight."""
    ends = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]


def listed(values: np.ndarray) -> list[float]:
    """As JSON numbers. They are rounded before they are applied, so the record is exactly what was done."""
    return [round(float(value), 5) for value in values]
