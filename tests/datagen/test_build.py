"""The whole job on real Ray: the same bytes whatever happens to it, and bad input said in one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from common.storage import open_folder
from datagen.dataset.loader import ShardReader
from datagen.dataset.shard_format import read_manifest, shard_name
from datagen.dataset.verify import faults
from tests.commands import Command, start
from tests.datagen.conftest import SAMPLES, SHARDS, VARIANTS, build_command, build_here, contents, refused

pytestmark = pytest.mark.distributed


def test_the_dataset_is_whole_and_its_story_is_told(whole: Path) -> None:
    folder = open_folder(whole)
    assert list(faults(folder)) == []
    manifest = read_manifest(folder)
    assert manifest.samples == SAMPLES and len(manifest.shards) == SHARDS
    assert manifest.extra["counts"] == {"sources": 5, "unreadable": 1, "filtered": 0, "planned": SAMPLES, "failed": 0}
    (line,) = [json.loads(line) for line in (whole / "quarantine.jsonl").read_text().splitlines()]
    assert line["source"] == "text.mp4" and "not a video" in line["reason"]
    report = (whole / "report.html").read_text()
    assert report.count("data:image/jpeg") == 24 and "text.mp4" in report
    batch = next(iter(ShardReader(whole, members=("latents", "lr", "hr"), seed=0, global_batch_size=2)))
    assert batch.tensors["z_hr"].shape == batch.tensors["z_lr"].shape == (2, 8, 3, 8, 8)
    assert batch.tensors["hr"].shape == (2, 9, 64, 64, 3) and batch.tensors["lr"].shape == (2, 9, 16, 16, 3)
    assert "/" not in batch.metadata[0]["source"].removeprefix("sub/")  # no path of this machine


def test_lr_is_reproducible_from_the_metadata(whole: Path) -> None:
    from datagen.degradation.degrade import apply_operations

    batch = next(iter(ShardReader(whole, members=("lr", "hr"), seed=1, global_batch_size=3)))
    for index, metadata in enumerate(batch.metadata):
        lr = apply_operations(batch.tensors["hr"][index].numpy(), metadata["draws"], metadata["seed"])
        assert (lr == batch.tensors["lr"][index].numpy()).all()


def kill_busy(process: Command, name: str) -> None:
    """SIGKILL to a process of the job while it works on a task whose Ray name starts with `name`."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the job ended before {name} could be killed"
        for child in psutil.Process().children(recursive=True):  # the job's workers are forks of the warm process
            with contextlib.suppress(psutil.Error):
                title = " ".join(child.cmdline())
                # an actor between two tasks has no method in its title
                if title.startswith(name) and (".submit" in title or "MapWorker" not in title):
                    os.kill(child.pid, signal.SIGKILL)
                    return
        time.sleep(0.01)
    raise AssertionError(f"{name} was not seen within 500 s")


def begin(config_file: Path, videos: Path, output: Path) -> Command:
    return start(*build_command(config_file, videos, output, "--workers", "2", *VARIANTS), warm_children=True)


def test_killed_workers_actors_and_writers_and_a_second_job_cost_nothing(
    whole: Path, begun: Path, videos: Path, config_file: Path
) -> None:
    process = begin(config_file, videos, begun)
    kill_busy(process, "ray::MapBatches(degrade)")
    assert "another job is writing here" in refused(config_file, videos, begun, *VARIANTS)
    kill_busy(process, "ray::MapWorker")
    kill_busy(process, "ray::ShardActor")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert contents(begun) == contents(whole)


@pytest.mark.parametrize("victim", ["driver", "raylet"])
def test_a_killed_driver_or_raylet_goes_on_where_it_was(
    victim: str, shared_ray: None, whole: Path, begun: Path, videos: Path, config_file: Path
) -> None:
    process = begin(config_file, videos, begun)
    while process.poll() is None and not (begun / "shards/shard-000000.json").exists():
        time.sleep(0.002)
    if victim == "driver":
        process.kill()
    else:
        (raylet,) = (child for child in psutil.Process(process.pid).children() if child.name() == "raylet")
        raylet.kill()
    _, stderr = process.communicate(timeout=60)
    if victim == "raylet":
        assert process.returncode == 2
        assert stderr.splitlines()[-1].startswith("error: Ray's raylet on this machine has ended")
    committed = {path: path.stat().st_mtime_ns for path in begun.glob("shards/*.json")}
    assert 0 < len(committed) < SHARDS and not (begun / "manifest.json").exists()
    build_here(config_file, videos, begun, "--workers", "1", *VARIANTS)
    assert contents(begun) == contents(whole)
    assert all(path.stat().st_mtime_ns == then for path, then in committed.items()), "a whole shard was made again"


def test_the_survey_alone_needs_no_vae(
    shared_ray: None, whole: Path, videos: Path, config_file: Path, tmp_path: Path
) -> None:
    build_here(config_file, videos, tmp_path, "--survey-only", "--set", "model.vae=nowhere")
    surveyed = {name: content for name, content in contents(whole).items() if name.startswith("survey/")}
    assert contents(tmp_path) == surveyed


def test_another_plan_in_the_same_folder_is_refused(whole: Path, videos: Path, config_file: Path) -> None:
    before = contents(whole)
    # windows of another stride would have to be surveyed
    for changed in ("seed=1", "clip.stride=1"):
        line = refused(config_file, videos, whole, *VARIANTS, "--set", f"datagen.{changed}")
        name = changed.partition("=")[0].partition(".")[0]
        assert f"was begun with another plan: config.{name} differ" in line and f"--reuse {whole}" in line
        assert contents(whole) == before


def test_verify_names_each_fault(whole: Path, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    for index, change in enumerate((lambda data: data[:-2000], lambda data: data[:1000] + b"x" + data[1001:])):
        path = damaged / shard_name(index)
        path.write_bytes(change(path.read_bytes()))
    (damaged / shard_name(2)).unlink()
    (damaged / "shards/shard-000003.json").write_text("{")
    (damaged / shard_name(99)).write_bytes(b"")
    found = "\n".join(faults(open_folder(damaged)))
    for expected in (
        "shard-000099.tar: not in the manifest",
        "shard-000000.tar: ",
        "shard-000001.tar: sha256",
        "shard-000001.tar: sample",
        "shard-000002.tar: missing",
        "shard-000003.json is damaged",
    ):
        assert expected in found
