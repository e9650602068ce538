"""Run a scenario on N gloo ranks, each a process of its own, and collect what each returns.

    results = run_on_ranks("tests.trainer.scenarios:parity", ranks=2, zero_stage=3)

A scenario is a function of (world, **arguments) that returns a dictionary of tensors, numbers and lists; its arguments
pass through JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.commands import start

SECONDS = 550


def run_on_ranks(target: str, ranks: int, **arguments: Any) -> list[dict[str, Any]]:
    """Returns each rank's result, in order; a failing rank fails the test with its own last words."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        probe.close()
        line = ("-m", "tests.trainer.ranks", target, json.dumps(arguments), folder)
        processes = [
            start(*line, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)
        ]
        end = time.monotonic() + SECONDS
        try:
            for process in processes:
                process.wait(max(0, end - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
        for process in processes:
            _, errors = process.communicate()
            assert process.returncode == 0, errors[-4000:]
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def _main(target: str, arguments: str, folder: str) -> None:
    try:
        from trainer.engine.process_group import start_distributed

        torch.set_num_threads(1)
        world = start_distributed()
        module, function = target.split(":")
        result = getattr(importlib.import_module(module), function)(world, **json.loads(arguments))
        torch.save(result, Path(folder, f"{world.rank}.pt"))
        torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # as quick as it began: gloo's threads are left behind


if __name__ == "__main__":
    _main(*sys.argv[1:])
