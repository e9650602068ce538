"""Run a scenario on N gloo ranks, each a process of its own, and collect what each returns.

    results = run_on_ranks("tests.trainer.scenarios:parity", ranks=2, zero_stage=3)

A scenario is a function of (world, **arguments) that returns a dictionary of tensors, numbers and lists.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 550


def run_on_ranks(target: str, ranks: int, **arguments: Any) -> list[dict[str, Any]]:
    """Returns each rank's result, in order; a failing rank fails the test with its own last words."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = []
        for rank in range(ranks):
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", __name__, target, json.dumps(arguments), folder]
            log = open(Path(folder, f"{rank}.log"), "w+")  # noqa: SIM115 (read after the process has ended)
            processes.append((subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log), log))
        try:
            codes = [process.wait(SECONDS) for process, _ in processes]
        finally:
            for process, _ in processes:
                process.kill()
        for code, (_, log) in zip(codes, processes, strict=True):
            log.seek(0)
            assert code == 0, log.read()[-4000:]
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def _main() -> None:
    target, arguments, folder = sys.argv[1:]
    from trainer.engine.process_group import start_distributed

    torch.set_num_threads(1)
    world = start_distributed()
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(world, **json.loads(arguments))
    torch.save(result, Path(folder, f"{world.rank}.pt"))
    torch.distributed.barrier()


if __name__ == "__main__":
    _main()
