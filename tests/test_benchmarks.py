"""The benchmarks start as files from anywhere, and Stage II's round costs what the README says."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.dual_stream_step import count_flops

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "def main" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_starts_as_a_file(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_a_round_needs_0_73_of_the_operations_of_a_literal_one() -> None:
    flops = count_flops(argparse.Namespace(frames=21, height=720, width=1280, batch=1), ("ours", "literal"))
    assert flops["ours"] / flops["literal"] == pytest.approx(0.7307, abs=1e-4)
