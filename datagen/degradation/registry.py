"""Degradation operations by name; one from outside the repository is named `package.module:Class`."""

from __future__ import annotations

from functools import cache
from typing import Any

from common.plugins import load_class
from datagen.degradation.blur import Blur
from datagen.degradation.jpeg import Jpeg
from datagen.degradation.noise import Noise
from datagen.degradation.operation import Operation
from datagen.degradation.resize import Resize, ResizeToTarget
from datagen.degradation.sharpen import Sharpen
from datagen.degradation.video_compression import VideoCompression

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (Sharpen(), Blur(), Resize(), Noise(), Jpeg(), VideoCompression(), ResizeToTarget())
}


@cache
def find_operation(name: str) -> Operation:
    """The operation that `op` of a record names.

    Raises:
        UserError: one from outside cannot be imported or is no `Operation`.
    """
    if name in OPERATIONS:
        return OPERATIONS[name]
    return load_class(name, Operation, option="degradation operation")()  # type: ignore[type-abstract]


def describe(draws: list[dict[str, Any]]) -> str:
    """The drawn operations of a sample in one line, in the order in which they were applied."""
    return " → ".join(find_operation(drawn["op"]).describe(drawn) for drawn in draws)
