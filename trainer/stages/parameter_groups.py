"""Parameter groups with learning rates of their own."""

from __future__ import annotations

from typing import Any

from torch import nn


def linear_apart(module: nn.Module, linear_learning_rate: float) -> list[dict[str, Any]]:
    """The linear path of a codec's network (`linear…`) and its convolutions, as far as they are trainable."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    linear = [parameter for name, parameter in named if name.startswith("linear")]
    rest = [parameter for name, parameter in named if not name.startswith("linear")]
    return [{"name": "linear", "params": linear, "lr": linear_learning_rate}, {"name": "convolutions", "params": rest}]
