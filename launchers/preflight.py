"""Can these nodes train? Within a minute, before a job of days: GPUs, versions, disk, an all-reduce over all ranks.

    launchers/slurm/submit.sh preflight --nodes=4 -- OUTPUT
    torchrun --nproc-per-node 8 -m launchers.preflight OUTPUT

One rank per GPU (or one per node without GPUs). Every node must see OUTPUT, have the versions of rank 0 and write as it
should; a rank that does not answer within the time limit ends the job with its name in the log.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: packages whose versions must be equal on all nodes
PACKAGES = ("torch", "deepspeed", "diffusers", "numpy", "ray", "safetensors")
#: bytes of the file that is written and read
FILE = 1 << 26
#: elements of the sum: 256 MiB in float32, as large as a bucket of gradients
ELEMENTS, ELEMENTS_CPU = 1 << 26, 1 << 20


def facts(output: Path, rank: int) -> dict[str, Any]:
    """What this node is, and how fast it writes to `output`.

    Raises:
        OSError: `output` cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    file, content = output / f".preflight-{rank}", os.urandom(1 << 20)
    began = time.monotonic()
    try:
        with file.open("wb") as handle:
            for _ in range(FILE // len(content)):
                handle.write(content)
            os.fsync(handle.fileno())
        seconds = time.monotonic() - began
    finally:
        file.unlink(missing_ok=True)
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else None
    return {
        "host": socket.gethostname(),
        "gpu": None if device is None else torch.cuda.get_device_name(device),
        "gpu_gib": None if device is None else round(torch.cuda.mem_get_info(device)[0] / 2**30, 1),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **_versions()},
        "free_gib": round(shutil.disk_usage(output).free / 2**30, 1),
        "write_mib_s": round(FILE / 2**20 / seconds),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def all_reduce(world: int) -> float:
    """Seconds of one sum over all ranks, after a first one.

    Raises:
        RuntimeError: a rank does not answer, or the sum is wrong.
    """
    cuda = torch.cuda.is_available()
    tensor = torch.empty(ELEMENTS if cuda else ELEMENTS_CPU, device="cuda" if cuda else "cpu")
    for _ in range(2):
        tensor.fill_(1.0)
        if cuda:
            torch.cuda.synchronize()
        began = time.monotonic()
        dist.all_reduce(tensor)
        total = float(tensor[-1])  # waits for it
    if total != world:
        raise RuntimeError(f"the sum over {world} ranks is {total}")
    return time.monotonic() - began


def differences(found: list[dict[str, Any]]) -> list[str]:
    """Ranks that are not as rank 0."""
    faults = []
    for rank, other in enumerate(found):
        for name, version in found[0]["versions"].items():
            if (theirs := other["versions"][name]) != version:
                faults.append(f"{other['host']} (rank {rank}) has {name} {theirs}, {found[0]['host']} has {version}")
        if other["gpu"] != found[0]["gpu"]:
            faults.append(f"{other['host']} (rank {rank}) has {other['gpu']}, {found[0]['host']} {found[0]['gpu']}")
    return list(dict.fromkeys(faults))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder that the jobs will write to")
    parser.add_argument("--seconds", type=float, default=60, help="that a rank has to answer")
    arguments = parser.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    cuda, limit = torch.cuda.is_available(), timedelta(seconds=arguments.seconds)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        mine = facts(arguments.output, rank)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=limit)
        found: list[Any] = [None] * world
        dist.all_gather_object(found, mine)
        seconds = all_reduce(world)
    except (OSError, RuntimeError) as error:
        print(f"error: {socket.gethostname()} (rank {rank}): {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    faults = differences(found)
    if rank == 0:
        for number, other in enumerate(found):
            shown = f"{other['gpu']}, {other['gpu_gib']} GiB free" if other["gpu"] else "no GPU"
            print(
                f"rank {number}: {other['host']}, {shown}; disk {other['free_gib']} GiB, {other['write_mib_s']} MiB/s"
            )
        print(f"all-reduce over {world} ranks: {seconds * 1e3:.1f} ms")
        print(", ".join(f"{name} {version}" for name, version in mine["versions"].items()), flush=True)
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()
    raise SystemExit(2 if faults else 0)


if __name__ == "__main__":
    main()
