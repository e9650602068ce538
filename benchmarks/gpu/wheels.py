"""Gather the wheels that a machine with Python 3.12 and torch 2.11 lacks for benchmarks/gpu/run.py.

    python benchmarks/gpu/wheels.py                                            # where there is a network
    python3 -m pip install --no-index --no-deps benchmarks/gpu/wheels/*.whl    # on the machine without one

Versions are those of constraints.txt. DeepSpeed is built here, without its compiled operators: the trainer uses none.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, from anywhere

from common.atomic import atomic_folder
from common.errors import UserError, run_command

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "gpu" / "wheels"
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
#: a loan carries 64 MiB: this folder, the dataset and the repository
LARGEST_MIB = 30

#: what deepspeed, diffusers, pydantic and rich import, less what torch and numpy bring along
PACKAGES = (
    *("diffusers", "huggingface-hub", "importlib-metadata", "zipp", "requests", "urllib3", "certifi", "idna"),
    *("charset-normalizer", "regex", "safetensors", "pillow", "pyyaml", "tqdm", "packaging", "filelock"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("einops", "hjson", "msgpack", "psutil", "py-cpuinfo"),
    *("rich", "markdown-it-py", "mdurl", "pygments"),
    *("httpx2", "httpcore2", "h11", "anyio", "truststore", "click", "lazy-importer", "ninja"),
)  # fmt: skip
#: published as source only
BUILT = ("deepspeed",)


def gather(folder: Path) -> list[Path]:
    """Replace `folder` by one with all wheels, atomically; returns them.

    Raises:
        UserError: a wheel cannot be had, or they are larger than `LARGEST_MIB` in all.
    """
    versions = pinned(ROOT / "constraints.txt")
    exactly = {name: f"{name}=={versions[name]}" for name in (*PACKAGES, *BUILT)}
    with atomic_folder(folder) as partial:
        partial.mkdir(parents=True)
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        wanted = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
        _pip("download", "--no-deps", "--dest", partial, *wanted, *(exactly[name] for name in PACKAGES))
        for name in BUILT:
            _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", partial, exactly[name])
        mib = sum(path.stat().st_size for path in partial.iterdir()) / 2**20
        if mib > LARGEST_MIB:
            raise UserError(f"the wheels take {mib:.1f} MiB, more than {LARGEST_MIB}: shorten PACKAGES in {__file__}")
    return sorted(folder.glob("*.whl"))


def pinned(path: Path) -> dict[str, str]:
    """Versions by name of a constraints file."""
    lines = (re.fullmatch(r"([\w.-]+)==(\S+)", line.strip()) for line in path.read_text().splitlines())
    return {match[1].lower().replace("_", "-"): match[2] for match in lines if match}


def _pip(*arguments: str | Path) -> None:
    command: Sequence[str] = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    environment = os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    if subprocess.run(command, env=environment, check=False).returncode:
        raise UserError(f"pip {arguments[0]} failed, see above; it needs the package index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the wheels; an older one is replaced")
    arguments = parser.parse_args()
    found = gather(arguments.output)
    print(f"{len(found)} wheels, {sum(path.stat().st_size for path in found) / 2**20:.1f} MiB, in {arguments.output}")


if __name__ == "__main__":
    run_command(main)
