"""Networks that take turns on a device: the one that computes is there, the others wait in the host's memory.

A network's weights are copied to the device for its turn and dropped after it; nothing is copied back, since they do
not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Offload:
    """Turns on one device."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    @contextmanager
    def turn(self, network: nn.Module) -> Iterator[None]:
        """The network is on the device within the block."""
        tensors = [*network.parameters(), *network.buffers()]
        at_home = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, copy=True)
            yield
        finally:
            for tensor, data in zip(tensors, at_home, strict=True):
                tensor.data = data
