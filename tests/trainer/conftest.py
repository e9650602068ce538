"""One process group for all tests of this folder that run in pytest's own process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from trainer.engine.process_group import World, start_distributed

LINEAR = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def _torch_keeps_its_linear_layer() -> Iterator[None]:
    """DeepSpeed replaces it with the first ZeRO-3 network, for good: what a later test measures would depend on it."""
    yield
    torch.nn.functional.linear = LINEAR


@pytest.fixture(scope="session")
def world() -> World:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    return start_distributed()
