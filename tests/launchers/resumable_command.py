"""Stands where PYTHON stands: writes down how each rank was started, then works in steps that survive a restart.

The folder of its notes is NOTES. With STEPS = n it counts to n in NOTES/step-<rank>, a tenth of a second each; asked
to stop by SIGUSR1 or SIGTERM it leaves with status 85, as trainer/run.py does. With DEAF it doesn't the first time.
As a node of a Ray cluster it stays until SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FROM_SETUP", "FROM_CONTAINER")


def main() -> None:
    if "--check" in sys.argv or "health-check" in sys.argv:
        return
    notes, rank = Path(os.environ["NOTES"]), os.environ.get("RANK", "0")
    deaf = "DEAF" in os.environ and "SLURM_RESTART_COUNT" not in os.environ
    asked: list[int] = []
    if "start" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        signal.pause()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    note = {"arguments": sys.argv[1:], **{name: os.environ.get(name) for name in NAMES}}
    with (notes / "starts.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")
    counter = notes / f"step-{rank}"
    done = int(counter.read_text()) if counter.exists() else 0
    while done < int(os.environ.get("STEPS", "0")):
        time.sleep(0.1)
        done += 1
        counter.write_text(str(done))
        if asked and not deaf:
            print(f"signal {asked[0]} at step {done}", flush=True)
            sys.exit(85)


if __name__ == "__main__":
    main()
