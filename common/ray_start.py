"""Ray for a job: started on this machine, or joined where a cluster runs."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from common.errors import UserError

#: s that the head of a cluster has to answer [ours]
ANSWER_WITHIN_S = 5.0
#: bytes of a folder below which Ray's sockets may lie: of the 107 that Linux takes, Ray appends up to 70
LONGEST_FOLDER = 37
#: whether Ray's processes ask each other for a token
TOKEN_MODE = "RAY_AUTH_MODE"


def join_or_start(address: str | None, cpus: int) -> None:
    """Connect to the cluster at `address`, or start Ray with `cpus` CPUs on this machine.

    Raises:
        UserError: no cluster at `address`, or one of another version.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray announces other names for arguments such as max_retries, which 2.60 does not have yet
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    # Ray's C++ side writes warnings for its developers to stderr; failures reach us as exceptions
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # the environment reaches the workers: one thread per task, cores are for other tasks
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}}
    start: dict[str, Any] = {"address": address}
    if address:
        check_answer(address)
    else:
        start = {"address": "local", "num_cpus": cpus, "include_dashboard": False} | _short_folder()
    try:
        with _silent_stderr(), _same_token_mode():
            ray.init(runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR, **start)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if not address:
            raise
        raise UserError(
            f"--address {address}: cannot join the Ray cluster there ({_one_line(error)}); its Ray and Python must "
            "be of this version, and where it asks for a token, RAY_AUTH_MODE=token must be set here"
        ) from None
    if address:
        _check_token_mode(address)
    _watch_raylet()


def _short_folder() -> dict[str, str]:
    """Where Ray keeps its sockets, if the folder that it would take makes their paths too long."""
    if "RAY_TMPDIR" in os.environ or len(os.fsencode(os.environ.get("TMPDIR", ""))) <= LONGEST_FOLDER:
        return {}
    return {"_temp_dir": "/tmp/ray"}


def _watch_raylet() -> None:
    """End this process with one line when the raylet that it is connected to ends.

    Ray itself ends it some seconds later, without Python's knowing and with lines about heartbeats.
    """
    own = ray.get_runtime_context().get_node_id()
    (path,) = (node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == own)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)

    def wait() -> None:
        with connection, suppress(ConnectionError):
            connection.recv(1)  # it says nothing to strangers: this is its end
        # after ray.shutdown() it ends as well
        if ray.is_initialized() and ray.get_runtime_context().get_node_id() == own:
            sys.stderr.write(
                "error: Ray's raylet on this machine has ended (out of memory, or killed); "
                "run the same command again to go on\n"
            )
            sys.stderr.flush()
            os._exit(2)

    threading.Thread(target=wait, daemon=True).start()


def _check_token_mode(address: str) -> None:
    """A process that asks for tokens refuses what the workers of a cluster without send, and waits for it for ever."""
    if os.environ.get(TOKEN_MODE, "").lower() != "token":
        return
    theirs = ray.get(ray.remote(num_cpus=0)(lambda: os.environ.get(TOKEN_MODE, "")).remote())
    if theirs.lower() in ("", "disabled"):
        ray.shutdown()
        raise UserError(
            f"--address {address}: {TOKEN_MODE}=token is set here, but the Ray cluster there runs without a token; "
            f"unset {TOKEN_MODE}"
        )


def check_answer(address: str) -> None:
    """Ray itself waits for minutes for a head that is not there."""
    found = _current_cluster() if address == "auto" else address
    host, colon, port = found.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_WITHIN_S).close()
    except (OSError, ValueError) as error:
        named = address if found == address else f"{address} ({found})"
        raise UserError(
            f"--address {named}: no Ray cluster answers there ({_one_line(error)}); start one with "
            "`ray start --head`, or leave --address out to run on this machine"
        ) from None


def _current_cluster() -> str:
    """Where Ray looks for `auto`: a killed job leaves the file behind."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray/ray_current_cluster")
    return os.environ.get("RAY_ADDRESS") or (file.read_text().strip() if file.exists() else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's start announces its own log level on the file descriptor itself."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


@contextmanager
def _same_token_mode() -> Iterator[None]:
    """Ray, started here, asks for a token and says so in this process's environment: commands that this process starts
    later would ask a cluster without one."""
    before = os.environ.get(TOKEN_MODE)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(TOKEN_MODE, None)
        else:
            os.environ[TOKEN_MODE] = before
