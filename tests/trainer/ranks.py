"""Run a scenario on N gloo ranks, each a process of its own, and collect what each returns.

    results = run_on_ranks("tests.trainer.scenarios:parity", ranks=2, zero_stage=3)

A scenario is a function of (world, **arguments) that returns a dictionary of tensors, numbers and lists.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 550


#: forks each rank from a process that has imported torch, DeepSpeed and the trainer, which takes longer than most tests
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["tests.trainer.scenarios"])


def run_on_ranks(target: str, ranks: int, **arguments: Any) -> list[dict[str, Any]]:
    """Returns each rank's result, in order; a failing rank fails the test with its own last words."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = []
        for rank in range(ranks):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            process = RANKS.Process(target=_run, args=(target, arguments, Path(folder), environment))
            process.start()
            processes.append(process)
        end = time.monotonic() + SECONDS
        try:
            for process in processes:
                process.join(end - time.monotonic())
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            process.join()
            assert process.exitcode == 0, Path(folder, f"{rank}.log").read_text()[-4000:]
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def _run(target: str, arguments: dict[str, Any], folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    log = os.open(folder / f"{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        from trainer.engine.process_group import start_distributed

        torch.set_num_threads(1)
        world = start_distributed()
        module, function = target.split(":")
        result = getattr(importlib.import_module(module), function)(world, **arguments)
        torch.save(result, folder / f"{world.rank}.pt")
        torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # as quick as it began: gloo's threads are left behind
