"""Stands in for the interpreter: `warm_python.py ADDRESS [-u] (-m MODULE | SCRIPT) ARGUMENT …`.

It hands its arguments, environment, folder and standard files to the process at ADDRESS (tests/warm_server.py), which
has the libraries imported, passes signals on and ends as the forked process ended. It needs the standard library alone
and starts in milliseconds.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys
from typing import Any

LONGEST = 1 << 18


def request(address: str, task: dict[str, Any], files: tuple[int, int, int]) -> tuple[socket.socket, int]:
    """Start a process; returns where its exit status will arrive, and its id.

    Args:
        task: what `become` of tests/warm_server.py reads.
        files: its standard input, output and error.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
    connection.connect(address)
    descriptors = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
    connection.sendmsg([json.dumps(task).encode()], [descriptors])
    return connection, int(connection.recv(64))


def _main(address: str, *line: str) -> None:
    if line[0] == "-c":
        os.execv(sys.executable, [sys.executable, *line])
    python = str(os.path.join(os.path.dirname(address), "python"))
    task = {"line": line, "folder": os.getcwd(), "environment": dict(os.environ), "python": python}
    connection, process = request(address, task, (0, 1, 2))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(process, number))
    status = int(connection.recv(64))
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    _main(*sys.argv[1:])
