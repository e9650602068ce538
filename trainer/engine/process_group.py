"""The ranks of a run: joined through a launcher's environment, or one alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device


def start_distributed() -> World:
    """Join the ranks that a launcher started (RANK, WORLD_SIZE, …), or be alone; NCCL on GPUs, else gloo."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "WORLD_SIZE" not in os.environ and not dist.is_initialized():
        # Alone: no port to find, and none left in the environment for child processes to trip over.
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if backend == "gloo":
        # Else DeepSpeed compiles a shared-memory reduction on its first start: a minute and a C++ compiler for nothing.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), device)


def gathered(value: Any) -> list[Any]:
    """The JSON-able `value` of each rank, rank 0's first. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's JSON-able `value`, on every rank. Collective."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
