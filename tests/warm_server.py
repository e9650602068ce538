"""A process that has imported this project's libraries, and nothing of the project, and forks into its commands.

Importing PyTorch, diffusers and DeepSpeed takes ten seconds of a core, which is more than most commands of the tests
compute. From its first line on, a command runs here as in a process of its own: its arguments, environment, folder,
`sys.path`, open files, session, exit status and end are those that it would have, and it imports the project itself.
What libraries read from the environment while they are imported is fixed (`FIXED`).
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "pipeline", "metrics", "datagen", "trainer", "preference")
#: what functions of the project and of its libraries import; the deepspeed launcher
MORE = (
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "torch._dynamo.repro.after_dynamo",
    "torch._inductor.compile_fx",
    "wandb",
)
#: reads the environment that a cluster's processes differ in as it is imported; alone it is quick
LEFT_OUT = ("ray",)
#: what libraries read as they are imported: it must be as it was then
FIXED = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "MPLCONFIGDIR", "PYTHONHASHSEED", "TORCH_HOME", "XDG_CACHE_HOME")


def import_libraries() -> None:
    """All that modules of the project import at their top."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as trainer/run.py does
    for path in sorted(path for package in PACKAGES for path in ROOT.joinpath(package).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                for name in node.names:
                    _import(name.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                _import(node.module, *(name.name for name in node.names))
    for module in MORE:
        _import(module)


def _import(module: str, *names: str) -> None:
    if module.split(".")[0] not in (*PACKAGES, *LEFT_OUT):
        with contextlib.suppress(ImportError):  # optional ones
            found = importlib.import_module(module)
            for name in names:
                getattr(found, name, None)  # some packages import a part when it is asked for


def serve(address: str) -> dict[str, Any]:
    """Fork for each connection until standard input ends. Returns in each fork, with what it is to run."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    while True:
        if 0 in select.select([0, listening], [], [])[0]:
            shutil.rmtree(Path(address).parent)
            os._exit(0)
        connection, _ = listening.accept()
        if not os.fork():
            break
        connection.close()
    listening.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, files, _, _ = socket.recv_fds(connection, 1 << 18, 3)
    process = os.fork()
    if not process:
        os.setsid()
        connection.send(str(os.getpid()).encode())
        connection.close()
        return json.loads(text) | {"files": files}
    for file in files:
        os.close(file)
    if connection in select.select([connection, os.pidfd_open(process)], [], [])[0]:
        os.killpg(process, signal.SIGKILL)  # whoever waited for it is gone
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(OSError):
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(task: dict[str, Any], own: dict[str, str], path: list[str]) -> None:
    """Run a command line as the interpreter does, in what serve() has returned."""
    wanted: dict[str, str] = task["environment"]
    # Ctrl-C has its effect, also where the tests run in the background of a shell, which ignores it for them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(task["files"]):
        os.dup2(file, number)
        os.close(file)
    for name in FIXED:
        if own.get(name) != wanted.get(name):
            sys.exit(f"{name} is read by libraries that are imported already: start this command with warm=False")
    if task.get("largest_file") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest_file"],) * 2)
    os.environ.clear()
    os.environ.update(wanted)
    os.chdir(task["folder"])
    line = list(task["line"])
    if line[0] == "-u" or wanted.get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    if line[0] == "-u":
        line = line[1:]
    import numpy as np
    import torch

    np.random.seed()
    torch.set_num_threads(int(wanted.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    sys.executable = task["python"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    given = [entry for entry in wanted.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if line[0] == "-m":
        sys.path[:] = [os.getcwd(), *given, *path]
        sys.argv = line[1:]
        runpy._run_module_as_main(line[1])  # type: ignore[attr-defined]
    else:
        sys.path[:] = [str(Path(line[0]).resolve().parent), *given, *path]
        sys.argv = line
        main.__file__ = line[0]
        exec(compile(Path(line[0]).read_bytes(), line[0], "exec"), main.__dict__)


if __name__ == "__main__":
    PATH = sys.path = sys.path[1:]  # without this file's folder
    OWN = dict(os.environ)
    import_libraries()
    become(serve(sys.argv[1]), OWN, PATH)
