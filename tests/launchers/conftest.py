"""A SLURM on this machine, one for all tests that submit jobs."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launchers.slurm_cluster import SlurmCluster, missing_programs, slurm_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge)")
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture
def command(tmp_path: Path) -> str:
    """An interpreter for PYTHON that runs the tests' tiny command whatever it is asked for."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent}/resumable_command.py "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return str(wrapper)
