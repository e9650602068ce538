"""A real SLURM on this machine alone: munged, slurmctld and two slurmd, in a folder of their own.

Its GPUs exist in its configuration only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credential has expired
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
GresTypes=gpu
NodeName=one NodeHostname={host} NodeAddr={address} Port={first_port} CPUs=2 Gres=gpu:h100:2 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr={address} Port={second_port} CPUs=2 Gres=gpu:h100:2 State=UNKNOWN
PartitionName=tests Nodes=ALL Default=YES State=UP
"""


def missing_programs() -> list[str]:
    """Programs of SLURM and munge that are not installed here."""
    return [name for name in PROGRAMS if _program(name) is None]


class SlurmCluster:
    """Two nodes, `one` and `two`, in partition `tests`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: where both nodes are
        self.address = _address()
        #: what commands of the cluster need in their environment
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PARTITION": "tests",
            "GPUS_PER_NODE": "0",
            "CPUS_PER_GPU": "1",
            "TIME_LIMIT": "00:10:00",
            "LOGS": str(folder / "logs"),
        }

    def run(self, *command: object, **environment: str) -> str:
        """Output of a command that must succeed."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: object, **environment: str) -> str:
        """Job id of `launchers/slurm/submit.sh` with these arguments."""
        return self.run("launchers/slurm/submit.sh", *arguments, **environment)

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows about a job."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in one of `states`; its log is in the error if it never is."""
        deadline = time.monotonic() + seconds
        while (shown := self.show(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {shown['JobState']}:\n{self.log(job)}"
            time.sleep(0.2)
        return shown

    def end_jobs(self) -> None:
        """Cancel what a failed test left behind, so that no process outlives the daemons."""
        if not self.run("squeue", "--noheader"):
            return
        self.run("scancel", "--state=RUNNING")
        self.run("scancel", "--state=PENDING")
        deadline = time.monotonic() + 20
        while self.run("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.3)

    def log(self, job: str) -> str:
        """All that a job has written."""
        files = sorted((self.folder / "logs").glob(f"*-{job}_*.log"))
        return "".join(file.read_text() for file in files)


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Start the daemons in the foreground, wait for both nodes, and end them by their process ids."""
    (folder / "state").mkdir(parents=True)
    configuration = folder / "slurm.conf"
    ports = dict(zip(("controller_port", "first_port", "second_port"), _free_ports(3), strict=True))
    user = _output("id", "-un")
    cluster = SlurmCluster(folder)
    host, user = _output("hostname", "-s"), _output("id", "-un")
    text = CONFIGURATION.format(folder=folder, host=host, user=user, address=cluster.address, **ports)
    configuration.write_text(text)
    # GPUs that can be asked for and counted, which nobody has
    for number in range(2):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu Type=h100 File={folder}/gpu[0-1]\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)

    files = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    commands = [
        [_program("munged"), "--foreground", "--force", f"--key-file={key}", *files],
        [_program("slurmctld"), "-D", "-c"],
        [_program("slurmd"), "-D", "-N", "one"],
        [_program("slurmd"), "-D", "-N", "two"],
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "daemons.log").open("wb") as log:
            for command in commands:
                daemons.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log))
                time.sleep(0.5)
        deadline = time.monotonic() + 60
        while not _idle(cluster):
            assert time.monotonic() < deadline, (folder / "daemons.log").read_text()[-4000:]
            time.sleep(0.3)
        yield cluster
        cluster.end_jobs()
    finally:
        for daemon in reversed(daemons):  # nodes first, munge last: their farewells are signed
            daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle(cluster: SlurmCluster) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=cluster.environment, capture_output=True, text=True
    )
    return done.stdout.split() == ["idle", "idle"]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


def _address() -> str:
    """This machine's address as others see it: Ray takes it for a node's even where it is told loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # chooses a route; nothing is sent
        return str(probe.getsockname()[0])
    return "127.0.0.1"
