"""A degradation that does nothing, unless a file says to `kill` its process or to `halve` its frames."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from common.config import Section
from datagen.degradation.operation import Drawn, Frames, HrShape, Operation


class TroubleConfig(Section):
    #: part of the samples that are in for it
    probability: float = 1.0
    #: the file
    orders: str = "nowhere"


def entry(orders: Path) -> dict[str, Any]:
    """Of a recipe's `extra`: two of the twelve clips of tests/datagen/conftest.py are in for it."""
    config = {"probability": 0.2, "orders": str(orders)}
    return {"operation": "tests.datagen.trouble:Trouble", "after": "last", "config": config}


class Trouble(Operation):
    name = "trouble"
    config = TroubleConfig

    def draw(self, config: Any, shape: HrShape, rng: np.random.Generator) -> Drawn | None:
        return {"orders": config.orders} if rng.random() < config.probability else None

    def apply(self, drawn: Drawn, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
        orders = Path(drawn["orders"])
        what = orders.read_text() if orders.exists() else ""
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "halve":  # which the VAE's actor trips over
            return [frame[::2] for frame in frames]
        return frames
