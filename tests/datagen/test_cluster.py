"""`--address`: the same bytes from a cluster that is already there, one line where there is none."""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from common.errors import run_command
from datagen.build_shards import main
from tests.commands import Command, run, start
from tests.datagen.conftest import VARIANTS, build_command, contents, one_line, run_build


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of its own: `ray start --head`, in a folder whose sockets have short names."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        options = ("--head", "--port", free_port(), "--temp-dir", folder, "--include-dashboard", "false")
        with ray_node(*options) as (_, said):
            found = re.search(r"--address='([^']+)'", said)
            assert found, said
            yield found[1]


@contextmanager
def ray_node(*options: object, warm_workers: bool = True) -> Iterator[tuple[Command, str]]:
    """A node of three CPUs for the duration of the block, and what it said until it ran. Warm workers are no children
    of it."""
    command = [Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus", "3", *options]
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_health_check_period_ms": "500"}
    output, written = os.pipe()
    line = ("-u", *command, "--object-store-memory", "200000000")
    node = start(*line, environment=environment, stdout=written, warm_children=warm_workers)
    os.close(written)
    try:
        with os.fdopen(output) as lines:
            said = ""
            for text in lines:
                said += text
                if "--block" in text:  # it runs
                    break
            yield node, said
    finally:
        kill_all(node)


def kill_all(node: Command) -> None:
    """SIGKILL to all of a node's processes."""
    if node.poll() is None:
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        node.wait()
        psutil.wait_procs(processes)


@pytest.mark.distributed
def test_a_running_cluster_gives_the_same_bytes(
    cluster: str, whole: Path, videos: Path, config_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "dataset"
    run_build(config_file, videos, output, *VARIANTS, "--address", cluster, "--workers", "2")
    assert contents(output) == contents(whole)


@pytest.mark.distributed
def test_a_node_that_dies_costs_nothing(
    cluster: str, whole: Path, begun: Path, videos: Path, config_file: Path, tmp_path: Path
) -> None:
    with ray_node("--address", cluster, "--node-ip-address", "127.0.0.2", warm_workers=False) as (node, _):
        line = build_command(config_file, videos, begun, *VARIANTS, "--address", cluster)
        with two_cpus_taken(cluster, tmp_path / "taken.py"):  # one is left, the job needs two: the node has to work
            process = start(*line, warm_children=True)
            worked = False
            while not (worked and (begun / "shards/shard-000000.json").exists()):
                assert process.poll() is None, "the job ended before the node worked for it"
                worked = worked or works(node)
                time.sleep(0.01)
            kill_all(node)
        _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert contents(begun) == contents(whole)


@contextmanager
def two_cpus_taken(cluster: str, script: Path) -> Iterator[None]:
    """Two of the head's three CPUs belong to a driver of its own for the duration of the block."""
    script.write_text(f"""
import time, ray
ray.init({cluster!r}, logging_level="ERROR", log_to_driver=False)
head = next(node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
Sleeper = ray.remote(num_cpus=2)(type("Sleeper", (), {{"ready": lambda self: True}}))
affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(head, soft=False)
sleeper = Sleeper.options(scheduling_strategy=affinity).remote()
ray.get(sleeper.ready.remote())
print("taken", flush=True)
time.sleep(600)
""")
    output, written = os.pipe()
    driver = start(script, environment={"RAY_AUTH_MODE": "disabled"}, stdout=written)
    os.close(written)
    try:
        with os.fdopen(output) as lines:
            assert any("taken" in line for line in lines)
            yield
    finally:
        kill_all(driver)


def works(node: Command) -> bool:
    """Whether a task or an actor of Ray Data's runs there."""
    return any(child.name().startswith("ray::Map") for child in psutil.Process(node.pid).children(recursive=True))


@pytest.mark.distributed
def test_a_token_for_a_cluster_that_runs_without(cluster: str, config_file: Path, videos: Path, tmp_path: Path) -> None:
    """The job would wait for ever: it refuses the answers of the cluster's workers."""
    command = build_command(config_file, videos, tmp_path / "out", "--address", cluster)
    done = run(*command, environment={"RAY_AUTH_MODE": "token"})
    line = one_line(done.returncode, done.stderr)
    assert f"--address {cluster}: RAY_AUTH_MODE=token is set here" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["named", "auto"])
def test_a_cluster_that_is_not_there(
    how: str,
    config_file: Path,
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address = f"127.0.0.1:{free_port()}"
    # what a killed job leaves behind
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(address)
    monkeypatch.setenv("RAY_TMPDIR", os.fspath(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = address if how == "named" else "auto"
    command = build_command(config_file, videos, tmp_path / "out", "--address", given)
    monkeypatch.setattr("sys.argv", command[1:])
    with pytest.raises(SystemExit) as left:
        run_command(main)
    line = capsys.readouterr().err
    assert left.value.code == 2 and not (tmp_path / "out").exists()
    assert line.startswith(f"error: --address {given}") and "no Ray cluster answers there" in line
    assert address in line
