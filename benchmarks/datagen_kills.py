"""SIGKILL at random moments of the shard job: the same bytes as undisturbed, and no hang.

    python benchmarks/datagen_kills.py [--kills 20] [--seed 0]

One build is left alone. In each of the others one process is killed once: the driver, the raylet, a worker that surveys
or degrades, a writer, or the actor with the VAE, in turn, at a moment drawn by the seed: while sources are surveyed, or
some time after a number of shards is committed. A command that ended with another status than 0 is run again, as a user
would. Then every file of the two datasets is compared. A command that takes longer than --limit is a hang. Commands
start as the tests start them, with the libraries imported. The last line is JSON; the exit status is 1 where a run hung
or differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, from anywhere

from common.errors import UserError, run_command
from common.lossless_clip import write_lossless
from tests.commands import Command, start

#: how the names of Ray's processes begin while they are what is to be killed
TITLES = {"worker": "ray::MapBatches(", "writer": "ray::ShardActor", "actor": "ray::MapWorker"}
VICTIMS = ("driver", "worker", "writer", "actor", "raylet")
#: part of the kills that come while sources are surveyed, of processes that are there then
SURVEYING = 0.25
#: a job that ends with status 2 so often does not go on
MOST_TRIES = 4
SOURCES, FRAMES, HEIGHT, WIDTH = 6, 63, 80, 96
SETTINGS = {"clip.frames": 9, "clip.crop": "[64,64]", "variants": 3, "samples_per_shard": 8, "validation_share": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments, and of which process of several")
    parser.add_argument("--limit", type=float, default=300.0, help="s that a command may take")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    runs = []
    with tempfile.TemporaryDirectory() as name:
        videos, whole = Path(name, "in"), Path(name, "whole/dataset")
        for index in range(SOURCES):
            write_lossless(videos / f"video{index}.mkv", drifting(index))
        start = time.monotonic()
        if finish(build(videos, whole), arguments.limit) != 0:
            raise UserError("the build that was left alone did not end with status 0")
        print(f"undisturbed: {time.monotonic() - start:.0f} s, {shards(whole)} shards\n")
        print("| # | killed | shards then | statuses | seconds | same bytes |\n|---|---|---|---|---|---|", flush=True)
        for number in range(arguments.kills):
            output = Path(name, f"{number}/dataset")  # of the same name, which the data card shows
            run = disturbed(VICTIMS[number % len(VICTIMS)], videos, output, shards(whole), arguments.limit, rng)
            run["same"] = contents(output) == contents(whole)
            runs.append(run)
            print(
                f"| {number + 1} | {run['killed']} | {run['shards']} | {', '.join(map(str, run['statuses']))} "
                f"| {run['seconds']} | {'yes' if run['same'] else 'NO'} |",
                flush=True,
            )
    same = sum(run["same"] for run in runs)
    hung = sum("hung" in run["statuses"] for run in runs)
    longest = max(run["seconds"] for run in runs)
    print()
    print(json.dumps({"kills": len(runs), "seed": arguments.seed, "same": same, "hung": hung, "longest_s": longest}))
    raise SystemExit(int(same < len(runs) or hung > 0))


def drifting(seed: int) -> np.ndarray:
    """uint8 (F, H, W, 3): soft texture that drifts by two px a frame, so that no filter rejects it."""
    across = WIDTH + 2 * FRAMES
    texture = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 4, across // 4, 3)).astype(np.uint8)
    large = cv2.resize(texture, (across, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.stack([large[:, 2 * index : 2 * index + WIDTH] for index in range(FRAMES)])


def build(videos: Path, output: Path) -> Command:
    """Start the command that makes or finishes `output`."""
    line = ["-m", "datagen.build_shards", "--config", "configs/tiny.yaml", "--workers", "2"]
    line += ["--input", str(videos), "--output", str(output)]
    for field, value in SETTINGS.items():
        line += ["--set", f"datagen.{field}={value}"]
    return start(*line, warm_children=True)


def finish(process: Command, limit_s: float) -> int | str:
    """Its exit status, or that it hung.

    Raises:
        UserError: a status that no killed process explains.
    """
    try:
        _, said = process.communicate(limit_s)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()
        return "hung"
    assert process.returncode is not None
    if process.returncode not in (0, 2, -signal.SIGKILL):
        raise UserError(f"the job ended with status {process.returncode}: {said}")
    return process.returncode


def disturbed(
    kind: str, videos: Path, output: Path, of_shards: int, limit_s: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Build `output` with one kill; how it went. Where the job ends before, it is built again with an earlier one."""
    surveying = kind in ("driver", "worker", "raylet") and rng.random() < SURVEYING
    committed, pause_s = (0, rng.uniform(0, 3)) if surveying else (rng.integers(of_shards - 1), rng.uniform(0, 0.5))
    while True:
        begun = time.monotonic()
        process = build(videos, output)

        def ready(process: Command = process, committed: int = committed) -> bool:
            return any(victims("worker", process.pid)) if surveying else reached(output, committed)

        while process.poll() is None and not ready():
            time.sleep(0.005)
        time.sleep(pause_s)
        killed = kill_one(kind, process, rng)
        then = shards(output)
        statuses = [finish(process, limit_s)]
        if killed:
            break
        shutil.rmtree(output)
        committed //= 2
    while statuses[-1] in (2, -signal.SIGKILL) and len(statuses) < MOST_TRIES:
        statuses.append(finish(build(videos, output), limit_s))
    seconds = round(time.monotonic() - begun)
    return {"killed": killed, "shards": then, "statuses": statuses, "seconds": seconds}


def reached(output: Path, committed: int) -> bool:
    """Whether so many shards are committed, or their making has begun where it is none."""
    return shards(output) >= committed and (output / "plan.json").exists()


def kill_one(kind: str, process: Command, rng: np.random.Generator) -> str | None:
    """SIGKILL to one process of the job that is of this kind, once there is one; what it was, None if none came."""
    while process.poll() is None:
        found = list(victims(kind, process.pid))
        if found:
            victim = found[rng.integers(len(found))]
            with contextlib.suppress(psutil.Error):
                title = " ".join(victim.cmdline()).partition(".")[0].strip() if kind in TITLES else kind
                victim.kill()
                return title
        time.sleep(0.005)
    return None


def victims(kind: str, driver: int) -> Iterator[psutil.Process]:
    """Processes of the job that are of this kind now."""
    with contextlib.suppress(psutil.Error):
        if kind == "driver":
            yield psutil.Process(driver)
        # workers are forks of the process that has the libraries
        for child in psutil.Process(driver if kind == "raylet" else None).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.name() == "raylet" if kind == "raylet" else is_called(kind, child):
                    yield child


def is_called(kind: str, process: psutil.Process) -> bool:
    """Whether it is one of Ray's processes of this kind."""
    return kind in TITLES and " ".join(process.cmdline()).startswith(TITLES[kind])


def shards(output: Path) -> int:
    """How many are committed."""
    return len(list(output.glob("shards/*.json")))


def contents(output: Path) -> dict[str, bytes]:
    """All files by name."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


if __name__ == "__main__":
    run_command(main)
