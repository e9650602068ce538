"""Stands where PYTHON stands: writes down how each rank was started, then works in steps that survive a restart.

The folder of its notes is NOTES. With STEPS = n it counts to n in NOTES/step-<rank>, a tenth of a second each; asked
to stop by SIGUSR1 or SIGTERM it leaves with status 85, as trainer/run.py does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")


def main() -> None:
    notes, rank = Path(os.environ["NOTES"]), os.environ.get("RANK", "0")
    asked: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
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
        if asked:
            print(f"signal {asked[0]} at step {done}", flush=True)
            sys.exit(85)


if __name__ == "__main__":
    main()
