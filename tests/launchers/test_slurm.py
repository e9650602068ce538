"""The SLURM scripts under a real SLURM: how ranks are started, the chain of jobs, saving and requeueing on a signal."""

from __future__ import annotations

import json
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.slurm_cluster import SlurmCluster, missing_programs, slurm_cluster

MISSING = missing_programs()
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian: slurm-wlm munge)"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def command(tmp_path: Path) -> str:
    """An interpreter for PYTHON that runs the tests' tiny command whatever it is asked for."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent}/resumable_command.py "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return str(wrapper)


def starts(notes: Path) -> list[dict[str, Any]]:
    """What every start of the tiny command wrote down, in order."""
    path = notes / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def counted(notes: Path, rank: int) -> int:
    path = notes / f"step-{rank}"
    return int(path.read_text() or 0) if path.exists() else 0


def test_every_rank_of_a_training_job_knows_its_place(cluster: SlurmCluster, notes: Path, command: str) -> None:
    job = cluster.submit(
        "train", "--nodes=2", "--", "--stage", "base", "--output", "a b", PYTHON=command, NOTES=str(notes)
    )
    cluster.wait(job, "COMPLETED")
    ranks = sorted(starts(notes), key=lambda start: str(start["RANK"]))
    assert [(start["RANK"], start["WORLD_SIZE"], start["LOCAL_RANK"]) for start in ranks] == [
        ("0", "2", "0"),
        ("1", "2", "0"),
    ]
    assert {start["MASTER_ADDR"] for start in ranks} == {cluster.address}
    assert len({start["MASTER_PORT"] for start in ranks}) == 1
    assert all(start["arguments"] == ["trainer/run.py", "--stage", "base", "--output", "a b"] for start in ranks)


def test_two_gpus_are_two_ranks_of_one_node(cluster: SlurmCluster, notes: Path, command: str) -> None:
    """GPUs cannot be had on a loopback cluster; what they decide, the number of tasks, is read from the request."""
    request = ("train", "--gpus-per-node=0", "--hold", "--", "--stage", "base")
    job = cluster.submit(*request, PYTHON=command, NOTES=str(notes), GPUS_PER_NODE="2")
    shown = cluster.show(job)
    cluster.run("scancel", job)
    assert (shown["NumTasks"], shown["CPUs/Task"], shown["Requeue"]) == ("2", "1", "1")


@pytest.mark.parametrize(
    ("name", "sent", "passed_on"), [("train", "USR1", "signal 10"), ("build_preference", "TERM", "signal 15")]
)
def test_a_warned_job_saves_is_requeued_and_goes_on(
    cluster: SlurmCluster, notes: Path, command: str, name: str, sent: str, passed_on: str
) -> None:
    ranks = 2 if name == "train" else 1
    environment = {"PYTHON": command, "NOTES": str(notes), "STEPS": "40"}
    job = cluster.submit(name, f"--nodes={ranks}", "--", **environment)
    while min(counted(notes, rank) for rank in range(ranks)) < 3:
        assert cluster.show(job)["JobState"] in ("PENDING", "RUNNING"), cluster.log(job)
        time.sleep(0.1)
    cluster.run("scancel", "--batch", f"--signal={sent}", job)  # what --signal=B:USR1@120 and a preemption do
    cluster.wait(job, "COMPLETED")
    log = cluster.log(job)
    assert log.count(passed_on) == ranks
    assert "requeueing" in log
    assert cluster.show(job)["Restarts"] == "1"
    assert len(starts(notes)) == 2 * ranks
    assert [counted(notes, rank) for rank in range(ranks)] == [40] * ranks


def test_a_cancelled_job_stays_cancelled(cluster: SlurmCluster, notes: Path, command: str) -> None:
    job = cluster.submit("train", "--", PYTHON=command, NOTES=str(notes), STEPS="1000")
    while counted(notes, 0) < 1:
        time.sleep(0.1)
    cluster.run("scancel", job)
    shown = cluster.wait(job, "CANCELLED")
    time.sleep(7)  # longer than a requeued job waits
    assert (cluster.show(job)["JobState"], shown["Restarts"]) == ("CANCELLED", "0")


def test_a_failed_job_ends_the_chain(cluster: SlurmCluster, notes: Path) -> None:
    out = cluster.run("launchers/slurm/chain.sh", "config.yaml", "videos", notes / "run", PYTHON="/bin/false")
    jobs = [line.split()[0] for line in out.splitlines()]
    cluster.wait(jobs[0], "FAILED")
    for job in jobs[1:]:
        cluster.wait(job, "CANCELLED")


def test_the_chain_runs_every_command_in_order(cluster: SlurmCluster, notes: Path, command: str) -> None:
    videos, output = notes / "videos", notes / "run"
    videos.mkdir()
    for name in ("one.mp4", "two videos.mkv", "three.MOV"):
        (videos / name).touch()
    (output / "upscaled").mkdir(parents=True)
    (output / "upscaled" / "one.mp4").touch()  # done before
    out = cluster.run(
        "launchers/slurm/chain.sh",
        "config.yaml",
        "videos",
        output,
        videos,
        "high",
        PYTHON=command,
        NOTES=str(notes),
        ARRAY="2",
    )
    names = [line.split()[1] for line in out.splitlines()]
    assert names == ["shards", "base", "progressive", "dual_stream", "pairs", "preference", "upscale", "evaluate"]
    cluster.wait(out.splitlines()[-1].split()[0], "COMPLETED")
    ran = [" ".join(start["arguments"]) for start in starts(notes)]
    ran = [line for line in ran if "ray.scripts.scripts" not in line]
    assert ran[0].startswith(f"-m datagen.build_shards --address {cluster.address}:")
    trained = [line.split()[4] for line in ran if line.startswith("trainer/run.py --config config.yaml --stage")]
    assert trained == ["base", "progressive", "dual_stream", "preference"]
    assert {line.split()[3] for line in ran if "preference.build" in line} == {"0/2", "1/2"}
    upscaled = sorted(start["arguments"][2] for start in starts(notes) if "pipeline.upscale" in start["arguments"])
    assert upscaled == [f"{videos}/three.MOV", f"{videos}/two videos.mkv"]
    assert ran[-1].startswith("-m metrics.evaluate --video")


def test_the_nodes_of_a_job_become_one_ray_cluster(cluster: SlurmCluster, notes: Path) -> None:
    driver = notes / "driver.py"
    driver.write_text(
        "import json, os, sys, time, ray\n"
        "ray.init(address=sys.argv[sys.argv.index('--address') + 1], log_to_driver=False)\n"
        "while len(nodes := [node for node in ray.nodes() if node['Alive']]) < 2: time.sleep(0.2)\n"
        "cpus = [node['Resources']['CPU'] for node in nodes]\n"
        "open(os.environ['NOTES'] + '/nodes.json', 'w').write(json.dumps(cpus))\n"
    )
    python = notes / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$2" in ray.*) exec {sys.executable} "$@" ;; *) exec {sys.executable} {driver} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    job = cluster.submit("build_shards", "--nodes=2", "--", "--config", "c", PYTHON=str(python), NOTES=str(notes))
    shown = cluster.wait(job, "COMPLETED", "FAILED", seconds=90)
    assert shown["JobState"] == "COMPLETED", cluster.log(job)
    assert json.loads((notes / "nodes.json").read_text()) == [1.0, 1.0]


def test_an_unknown_command_is_named(cluster: SlurmCluster) -> None:
    with pytest.raises(AssertionError, match=r"no command 'trian'; there are .*train"):
        cluster.submit("trian", "--")


def test_a_bad_video_does_not_end_the_others(cluster: SlurmCluster, tmp_path: Path) -> None:
    videos, output, wrapper = tmp_path / "videos", tmp_path / "out", tmp_path / "python"
    videos.mkdir()
    for name in ("a.mp4", "broken.mp4", "c.webm"):
        (videos / name).touch()
    wrapper.write_text('#!/bin/sh\ncase "$3" in *broken*) exit 2;; esac\ntouch "$4"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    job = cluster.submit("upscale", "--", videos, output, "--bicubic", PYTHON=str(wrapper))
    cluster.wait(job, "FAILED")
    assert sorted(path.name for path in output.iterdir()) == ["a.mp4", "c.webm"], cluster.log(job)
