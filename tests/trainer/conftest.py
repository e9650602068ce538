"""One process group for all tests of this folder that run in pytest's own process."""

from __future__ import annotations

import logging

import pytest
import torch

from trainer.networks import World, start_distributed


@pytest.fixture(scope="session")
def world() -> World:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    return start_distributed()
