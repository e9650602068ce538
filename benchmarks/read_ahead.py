"""What share of a training step is spent waiting for its batches, with two batches read ahead and with all of a step.

    python benchmarks/read_ahead.py [--batches 16] [--compute 4]

A step of Stage II takes all its batches at once (five auxiliary updates and one of the student, times the
accumulation), then computes. Two batches read ahead, which is the reader's default, are gone at once; `trainer.train`
asks for those of a step and one more. Samples have the size of a 21 x 704 x 1280 pair of Wan2.1 latents (5.4 MB); they
come from a local folder and from an S3 server on this machine (moto's, a process of its own), by range requests.
`--compute` seconds of sleep stand for the GPU's part of a step, in which the host is free. The first step fills the
queue and does not count.
The last line is one JSON object: seconds waited per step, and its share.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, from anywhere

from common.storage import StorageConfig, open_folder
from datagen.dataset.loader import ShardReader
from datagen.dataset.shard_format import Sample, write_manifest, write_shard

#: (C, T, h, w) of 21 x 704 x 1280
LATENT = (16, 6, 88, 160)
SAMPLES, SAMPLES_PER_SHARD = 32, 8
DEFAULT_AHEAD = 2
SECONDS_TO_START = 60


def write_dataset(url: str, storage: StorageConfig | None) -> None:
    """Random latents in the shard format."""
    folder = open_folder(url, storage)
    generator = torch.Generator().manual_seed(0)
    shards = []
    for first in range(0, SAMPLES, SAMPLES_PER_SHARD):
        samples = []
        for number in range(first, first + SAMPLES_PER_SHARD):
            latents = {name: torch.randn(LATENT, generator=generator).to(torch.bfloat16) for name in ("z_hr", "z_lr")}
            metadata = json.dumps({"caption": "", "seed": number}).encode()
            samples.append(Sample(f"{number:06d}", {"latents.safetensors": save(latents), "json": metadata}))
        shards.append(write_shard(folder, first // SAMPLES_PER_SHARD, samples))
    write_manifest(folder, "clips", shards)


@contextmanager
def s3_server() -> Iterator[StorageConfig]:
    """moto's server with a bucket named `bucket`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + SECONDS_TO_START
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if time.monotonic() > end or server.poll() is not None:
                raise SystemExit("error: moto's S3 server did not start; it comes with `pip install -e .[dev]`")
            time.sleep(0.1)
        storage = StorageConfig(endpoint_url=f"http://127.0.0.1:{port}")
        open_folder("s3://bucket/x", storage)._system.mkdir("bucket")  # type: ignore[attr-defined]
        yield storage
    finally:
        server.kill()
        server.wait()


def waited(url: str, storage: StorageConfig | None, ahead: int, arguments: argparse.Namespace) -> list[float]:
    """Seconds that each step waits for its batches."""
    reader = ShardReader(url, seed=0, global_batch_size=1, storage=storage)
    reader.read_ahead(ahead)
    batches = iter(reader)
    seconds = []
    for _ in range(arguments.steps + 1):
        start = time.perf_counter()
        for _ in range(arguments.batches):
            next(batches)
        seconds.append(time.perf_counter() - start)
        time.sleep(arguments.compute)
    batches.close()  # type: ignore[attr-defined]
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=16, help="of one step")
    parser.add_argument("--compute", type=float, default=4.0, help="seconds of a step without its waiting")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    ways = {"before": DEFAULT_AHEAD, "now": arguments.batches + 1}
    result: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as local, s3_server() as storage:
        for place, url, options in (("local", local, None), ("s3", "s3://bucket/data", storage)):
            write_dataset(url, options)
            result[place] = {}
            for way, ahead in ways.items():
                seconds = statistics.median(waited(url, options, ahead, arguments))
                share = seconds / (seconds + arguments.compute)
                result[place][way] = {"read_ahead": ahead, "seconds": seconds, "share": share}
    lines = [
        f"# command: python benchmarks/read_ahead.py {' '.join(sys.argv[1:])}".rstrip(),
        f"# {os.cpu_count()} CPU cores, torch {torch.__version__}; medians of {arguments.steps} steps of "
        f"{arguments.batches} batches and {arguments.compute} s",
    ]
    for place, rows in result.items():
        for way, row in rows.items():
            lines.append(
                f"{place:6s} {way:7s} {row['read_ahead']:3.0f} ahead: waits {row['seconds']:.3f} s a step, "
                f"{100 * row['share']:.1f} % of it"
            )
    print("\n".join([*lines, json.dumps(result)]))


if __name__ == "__main__":
    main()
