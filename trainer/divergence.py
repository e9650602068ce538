"""Counts steps whose numbers are not finite or whose gradient norm exploded; several in a row end the run."""

from __future__ import annotations

import math
from typing import Any


class DivergenceWatch:
    """Counts steps whose numbers are not finite or whose gradient norm exploded.

    The engines skip an update that is not finite and clip an exploded one. The numbers are means over the ranks, so
    every rank decides alike.
    """

    #: steps seen before a norm can count as exploded
    SETTLING_STEPS = 20

    def __init__(self, limit: int, factor: float) -> None:
        """
        Args:
            limit: bad steps in a row that end the run.
            factor: a norm so many times its running mean has exploded.
        """
        self.limit, self.factor = limit, factor
        self.in_a_row = self.total = self.seen = 0
        self._usual: dict[str, float] = {}

    def observe(self, values: dict[str, float]) -> str | None:
        """What is wrong with a step's numbers, or None."""
        fault = self._fault(values)
        self.seen += 1
        if fault is not None:
            self.in_a_row += 1
            self.total += 1
            return fault
        self.in_a_row = 0
        for name, norm in _norms(values).items():
            self._usual[name] = 0.95 * self._usual.get(name, norm) + 0.05 * norm
        return None

    def _fault(self, values: dict[str, float]) -> str | None:
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        for name, norm in _norms(values).items() if self.seen >= self.SETTLING_STEPS else ():
            if norm > self.factor * self._usual.get(name, math.inf):
                return f"{name} is {norm:.3g}, usually {self._usual[name]:.3g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "total": self.total, "seen": self.seen, "usual": self._usual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.in_a_row, self.total, self.seen = state["in_a_row"], state["total"], state["seen"]
            self._usual = dict(state["usual"])


def _norms(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.startswith("gradient_norm")}
