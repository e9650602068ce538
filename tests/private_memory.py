"""How much memory this process has to itself: what is mapped from files does not count."""

from __future__ import annotations

from pathlib import Path


def private_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
