"""The SLURM scripts under a real SLURM: how ranks are started, the chain of jobs, saving and requeueing on a signal."""

from __future__ import annotations

import json
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.distributed
CONFIG = "configs/tiny.yaml"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path


def starts(notes: Path) -> list[dict[str, Any]]:
    """What every start of the tiny command wrote down, in order."""
    path = notes / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def chain(cluster: SlurmCluster, videos: Path, output: Path, *more: object, **environment: str) -> str:
    """What `duo-vsr chain … --slurm` prints."""
    words = more or ("--slurm",)
    return cluster.run(sys.executable, "-m", "launchers.chain", CONFIG, videos, output, *words, **environment)


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


@pytest.mark.parametrize(
    ("name", "gpus", "asked", "tasks"),
    [("train", "h100:2", "gpu:h100:2", "2"), ("upscale", "h100:2", "gpu:h100:1", "1"), ("train", "2", "gpu:2", "2")],
)
def test_gpus_are_asked_for_with_their_type(
    cluster: SlurmCluster, notes: Path, command: str, name: str, gpus: str, asked: str, tasks: str
) -> None:
    """The cluster's GPUs can only be counted; what they decide, the number of tasks, is read from the request."""
    job = cluster.submit(name, "--hold", "--", PYTHON=command, NOTES=str(notes), GPUS_PER_NODE=gpus)
    shown = cluster.show(job)
    cluster.run("scancel", job)
    assert (shown["TresPerNode"].removeprefix("gres:").replace("gres/", ""), shown["NumTasks"]) == (asked, tasks)
    assert (shown["CPUs/Task"], shown["Requeue"]) == ("1", "1")


def test_a_job_begins_with_the_clusters_lines(cluster: SlurmCluster, notes: Path, command: str) -> None:
    """And a container is a line of shell: quotes keep a path with blanks together."""
    container = notes / "my tools" / "run"
    container.parent.mkdir()
    container.write_text('#!/bin/sh\nexport FROM_CONTAINER="$1"\nshift\nexec "$@"\n')
    container.chmod(0o755)
    lines = "module() { export FROM_SETUP=$2; }\nmodule load cuda/12.8"
    environment = {"SETUP": lines, "CONTAINER": f"'{container}' 'one word'", "PYTHON": command, "NOTES": str(notes)}
    cluster.wait(cluster.submit("evaluate", "--", "--video", "a b", **environment), "COMPLETED")
    (start,) = starts(notes)
    assert (start["FROM_SETUP"], start["FROM_CONTAINER"]) == ("cuda/12.8", "one word")
    assert start["arguments"] == ["-m", "metrics.evaluate", "--video", "a b"]


@pytest.mark.parametrize(("array", "parts"), [("1-2", {"0/2", "1/2"}), ("4-8:2", {"0/3", "1/3", "2/3"})])
def test_an_array_may_begin_with_any_number(
    cluster: SlurmCluster, notes: Path, command: str, array: str, parts: set[str]
) -> None:
    job = cluster.submit("build_preference", f"--array={array}", "--", PYTHON=command, NOTES=str(notes))
    while len(starts(notes)) < len(parts):
        assert "error" not in cluster.log(job), cluster.log(job)
        time.sleep(0.1)
    assert {start["arguments"][3] for start in starts(notes)} == parts


def test_an_array_with_gaps_is_refused(cluster: SlurmCluster, notes: Path, command: str) -> None:
    job = cluster.submit("build_preference", "--array=1,2,5", "--", PYTHON=command, NOTES=str(notes))
    cluster.wait(job, "FAILED")
    assert "an array with gaps would leave work undone" in cluster.log(job) and not starts(notes)


@pytest.mark.parametrize(
    ("name", "nodes", "sent", "passed_on"),
    [
        ("train", 2, "USR1", "signal 10"),
        ("build_preference", 1, "TERM", "signal 15"),
        ("build_shards", 2, "USR1", "signal 2"),
    ],
)
def test_a_warned_job_saves_is_requeued_and_goes_on(
    cluster: SlurmCluster, notes: Path, command: str, name: str, nodes: int, sent: str, passed_on: str
) -> None:
    ranks = 2 if name == "train" else 1
    environment = {"PYTHON": command, "NOTES": str(notes), "STEPS": "40"}
    job = cluster.submit(name, f"--nodes={nodes}", "--", **environment)
    while min(counted(notes, rank) for rank in range(ranks)) < 3:
        assert cluster.show(job)["JobState"] in ("PENDING", "RUNNING"), cluster.log(job)
        time.sleep(0.1)
    cluster.run("scancel", "--batch", f"--signal={sent}", job)  # what --signal=B:USR1@120 and a preemption do
    cluster.wait(job, "COMPLETED")
    log = cluster.log(job)
    assert log.count(passed_on) == ranks
    assert "requeueing" in log
    assert cluster.show(job)["Restarts"] == "1"
    assert len([start for start in starts(notes) if "ray.scripts.scripts" not in start["arguments"]]) == 2 * ranks
    assert "Killed" not in log and "unbound" not in log, log
    assert [counted(notes, rank) for rank in range(ranks)] == [40] * ranks


def test_the_lead_time_before_the_limit_is_a_field_and_what_does_not_stop_in_it_is_killed(
    cluster: SlurmCluster, notes: Path, command: str
) -> None:
    """SLURM looks each half minute, so a warning 59 s before a limit of 60 s comes soon. Then two of the four seconds
    of a short lead are left to a command that does not listen."""
    environment = {"PYTHON": command, "NOTES": str(notes), "STEPS": "600"}
    warned = cluster.submit("train", "--nodelist=one", "--", **environment, TIME_LIMIT="1", LEAD_TIME="59")
    (notes / "deaf").mkdir()
    environment |= {"NOTES": str(notes / "deaf"), "DEAF": "1"}
    deaf = cluster.submit("train", "--nodelist=two", "--", **environment, LEAD_TIME="4")
    while counted(notes / "deaf", 0) < 1:
        time.sleep(0.1)
    cluster.run("scancel", "--batch", "--signal=USR1", deaf)
    for job, said in ((deaf, "killing it; give a larger LEAD_TIME"), (warned, "signal 10")):
        deadline = time.monotonic() + 90
        while "requeueing" not in (log := cluster.log(job)):
            assert time.monotonic() < deadline, log
            time.sleep(0.2)
        assert said in log
    cluster.run("scancel", deaf, warned)


def test_a_cancelled_job_stays_cancelled(cluster: SlurmCluster, notes: Path, command: str) -> None:
    job = cluster.submit("train", "--", PYTHON=command, NOTES=str(notes), STEPS="1000")
    while counted(notes, 0) < 1:
        time.sleep(0.1)
    cluster.run("scancel", job)
    shown = cluster.wait(job, "CANCELLED")
    time.sleep(7)  # longer than a requeued job waits
    assert (cluster.show(job)["JobState"], shown["Restarts"]) == ("CANCELLED", "0")


def test_a_failed_job_ends_the_chain(cluster: SlurmCluster, notes: Path) -> None:
    (notes / "videos").mkdir()
    python = notes / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *--check*|*preflight*) exit 0;; esac\nexit 1\n')
    python.chmod(0o755)
    out = chain(cluster, notes / "videos", notes / "run", PYTHON=str(python))
    jobs = [line.split()[0] for line in out.splitlines()]
    cluster.wait(jobs[0], "COMPLETED")
    cluster.wait(jobs[1], "FAILED")
    for job in jobs[2:]:
        cluster.wait(job, "CANCELLED")


def test_the_chain_runs_every_command_in_order(cluster: SlurmCluster, notes: Path, command: str) -> None:
    videos, output = notes / "videos", notes / "run"
    videos.mkdir()
    for name in ("one.mp4", "two videos.mkv", "three.MOV"):
        (videos / name).touch()
    (output / "upscaled").mkdir(parents=True)
    (output / "upscaled" / "one.mp4").touch()  # done before
    words = ("--test", videos, videos, "--slurm", "--array", "1-2", "--", "--comment=all of them")
    out = chain(cluster, videos, output, *words, PYTHON=command, NOTES=str(notes))
    names = [line.split()[1] for line in out.splitlines()]
    assert cluster.show(out.split()[-2])["Comment"] == "all"
    assert names == [
        "preflight",
        "shards",
        "base",
        "progressive",
        "dual_stream",
        "pairs",
        "preference",
        "upscale",
        "evaluate",
    ]
    cluster.wait(out.splitlines()[-1].split()[0], "COMPLETED")
    ran = [" ".join(start["arguments"]) for start in starts(notes)]
    ran = [line for line in ran if "ray.scripts.scripts" not in line]
    assert ran[0] == f"-m launchers.preflight {output}"
    assert ran[1].startswith(f"-m datagen.build_shards --address {cluster.address}:")
    trained = [line.split()[4] for line in ran if line.startswith(f"trainer/run.py --config {CONFIG} --stage")]
    assert trained == ["base", "progressive", "dual_stream", "preference"]
    assert {line.split()[3] for line in ran if "preference.build" in line} == {"0/2", "1/2"}
    upscaled = sorted(start["arguments"][2] for start in starts(notes) if "pipeline.upscale" in start["arguments"])
    assert upscaled == [f"{videos}/three.MOV", f"{videos}/two videos.mkv"]
    assert ran[-1].startswith("-m metrics.evaluate --video")


def test_a_refused_job_takes_those_before_it_along(cluster: SlurmCluster, notes: Path, command: str) -> None:
    """`--array` is read by sbatch only when the pairs are submitted: four jobs wait by then."""
    (notes / "videos").mkdir()
    with pytest.raises(AssertionError, match=r"pairs was refused, so no job runs: .*array"):
        chain(cluster, notes / "videos", notes / "run", "--slurm", "--array", "x", PYTHON=command, NOTES=str(notes))
    deadline = time.monotonic() + 20
    while cluster.run("squeue", "--noheader"):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert not starts(notes)


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
