"""Small moving pictures, a random VAE and a configuration: a dataset of twelve samples in seconds."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import yaml
from safetensors.torch import save

from common.errors import run_command
from common.lossless_clip import write_lossless
from common.storage import open_folder
from datagen.build_shards import main
from datagen.config import DatagenConfig
from datagen.dataset.shard_format import Manifest, Sample, write_manifest, write_shard
from datagen.ray_cluster import start_ray
from pipeline.model.tiny_vae import TinyVideoVAE
from tests.commands import python, run

SHARD_SIZES = (5, 1, 9, 3)
#: twelve windows in three variants: long enough to be killed in the middle
VARIANTS = ("--set", "datagen.variants=3")
SAMPLES, SHARDS = 36, 9


def moving_picture(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (F, H, W, 3): soft texture that drifts by two px a frame, so that no filter rejects it."""
    import cv2

    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (height // 4, (width + 2 * frames) // 4 + 1, 3)).astype(np.uint8)
    large = cv2.resize(texture, (width + 2 * frames, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([large[:, 2 * index : 2 * index + width] for index in range(frames)])


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """What `make` makes in an empty folder, made by one of pytest's processes for all of them."""
    shared = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    said = shared / f"{name}-made"
    with open(shared / f"{name}-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            (shared / name).mkdir(exist_ok=True)
            said.write_text(os.fspath(make(shared / name)))
    return Path(said.read_text())


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "videos", write_videos)


def write_videos(folder: Path) -> Path:
    """Four readable videos of three windows each, and a text file that calls itself a video."""
    for index in range(4):
        write_lossless(folder / f"sub/video{index}.mkv", moving_picture(27, 80, 96, index))
    (folder / "text.mp4").write_text("this is no video\n")
    return folder


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "config", write_config)


def write_config(folder: Path) -> Path:
    """Crops of 64 x 64, windows of 9, shards of 4; the VAE is small and random."""
    torch.manual_seed(0)
    TinyVideoVAE(z_dim=8, hidden_dim=16, num_blocks=1).save_pretrained(folder / "vae")
    document = {
        "model": {"vae": str(folder / "vae"), "prompts": "nowhere"},
        "datagen": {
            "clip": {"frames": 9, "crop": [64, 64]},
            "samples_per_shard": 4,
            "degradation": {"weights": {"realbasicvsr": 1.0, "mild": 1.0}},
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def build_command(config: Path, videos: Path | str, output: Path | str, *more: str) -> list[str]:
    """The command as a user types it after `python`."""
    command = ["-m", "datagen.build_shards", "--config", str(config)]
    return command + ["--input", str(videos), "--output", str(output), *more]


def run_build(config: Path, videos: Path | str, output: Path | str, *more: str, **environment: str) -> str:
    """Run the command to its end; its stderr, or a failed assertion."""
    done = run(*build_command(config, videos, output, *more), environment=environment, warm_children=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def said_here(config: Path, videos: Path | str, output: Path | str, *more: str) -> tuple[int, str]:
    """Exit status of the command and its stderr, run in this process: on the Ray of `shared_ray` where that runs."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said), redirect_stdout(io.StringIO()):
        patch.setattr("sys.argv", build_command(config, videos, output, *more)[1:])
        try:
            run_command(main)
        except SystemExit as left:
            assert isinstance(left.code, int)
            return left.code, said.getvalue()
    return 0, said.getvalue()


def build_here(config: Path, videos: Path | str, output: Path | str, *more: str) -> str:
    """Run the command to its end in this process; its stderr, or a failed assertion."""
    status, said = said_here(config, videos, output, *more)
    assert status == 0, said
    return said


def refused(config: Path, videos: Path | str, output: Path | str, *more: str) -> str:
    """What the command, run in this process, says beside its progress: one line, before it ends with status 2."""
    return one_line(*said_here(config, videos, output, *more))


def one_line(status: int | None, stderr: str) -> str:
    """The one line beside progress that a command with this status and stderr ended with."""
    assert status == 2, stderr
    (line,) = [line for line in stderr.splitlines() if not line.startswith(("survey: ", "samples: "))]
    assert line.startswith("error: ")
    return line


def contents(dataset: Path) -> dict[str, bytes]:
    """All files of a dataset by name."""
    return {str(path.relative_to(dataset)): path.read_bytes() for path in sorted(dataset.rglob("*")) if path.is_file()}


@pytest.fixture(scope="package", autouse=True)
def ray_ends() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture
def shared_ray(ray_ends: None) -> None:
    """Ray for all jobs that run in this process: its start, and that of its workers, cost more than the jobs."""
    start_shared_ray()


def start_shared_ray() -> None:
    """Start it unless it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", python())
        start_ray(None, 3, DatagenConfig())


@pytest.fixture(scope="package")
def whole(ray_ends: None, videos: Path, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted build by three workers; what the others are compared with."""

    def build(folder: Path) -> Path:
        start_shared_ray()
        build_here(config_file, videos, folder / "dataset", "--workers", "3", *VARIANTS)
        return folder / "dataset"

    return made_once(tmp_path_factory, "whole", build)


@pytest.fixture
def begun(whole: Path, tmp_path: Path) -> Path:
    """An output whose survey is finished."""
    shutil.copytree(whole / "survey", tmp_path / "begun/dataset/survey")
    return tmp_path / "begun/dataset"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of 18 numbered samples in shards of very different sizes, without building one."""
    return write_numbered(tmp_path / "dataset")


def write_numbered(path: Path) -> Path:
    folder = open_folder(path)
    shards, number = [], 0
    for index, size in enumerate(SHARD_SIZES):
        samples = []
        for _ in range(size):
            latent = torch.full((2, 1, 4, 4), number, dtype=torch.bfloat16)
            members = {
                "latents.safetensors": save({"z_hr": latent, "z_lr": latent + 1}),
                "json": json.dumps({"number": number, "caption": "", "seed": number}).encode(),
            }
            samples.append(Sample(f"key{number:03d}", members))
            number += 1
        shards.append(write_shard(folder, index, samples))
    manifest: Manifest = write_manifest(folder, "clips", shards)
    assert manifest.samples == sum(SHARD_SIZES)
    return path
