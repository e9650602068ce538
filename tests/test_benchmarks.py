"""The benchmarks start as files from anywhere, and Stage II's round costs what the README says."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.dual_stream_step import count_flops
from benchmarks.effect.train import CONFIG, ROWS, chain
from benchmarks.read_ahead import waited, write_dataset
from benchmarks.validation_cost import shares
from common.config import load_section
from common.errors import UserError
from trainer.config import config_class
from trainer.stages import find_stage

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(
    str(path.relative_to(FOLDER))
    for path in (*FOLDER.glob("*.py"), *FOLDER.glob("effect/*.py"))
    if "def main" in path.read_text()
)


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


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_ablations_is_a_valid_configuration(name: str) -> None:
    row = ROWS[name]
    stage = find_stage(row.stage)
    config = load_section(FOLDER.parent / CONFIG, "trainer", config_class(stage), list(row.settings))
    assert (
        config.section_of(stage)
        != load_section(FOLDER.parent / CONFIG, "trainer", config_class(stage), []).section_of(stage)
        or not row.settings
    )


def test_rows_come_after_the_rows_they_start_from() -> None:
    assert chain(["swapped_labels"]) == ["progressive", "dual_stream", "swapped_labels"]
    assert chain(["without_dual_stream", "decoupled_dmd"]) == ["progressive", "without_dual_stream", "decoupled_dmd"]
    with pytest.raises(UserError, match="--rows dmd: choose from progressive"):
        chain(["dmd"])


def test_validation_waits_for_the_rank_with_the_most_clips() -> None:
    """4 clips on 64 ranks are one on some and none on others: 400 of previews and 3 x 100 of decoding in 100 rounds."""
    arguments = argparse.Namespace(config=Path("configs/wan-1.3b.yaml"), decoder_efficiency=1.0)
    operations = {"round": 4000.0, "previews": 400.0, "decode": 100.0, "previews_shown": 3.0}
    table = shares(operations, arguments)
    assert table[64]["now"] == pytest.approx(700 / (100 * 4000 + 700))
    assert table[8]["now"] == pytest.approx(700 / (100 * 8 * 4000 + 700))
    assert table[8]["before"] == pytest.approx(4 * 900 / (100 * 8 * 4000 + 4 * 900))


def test_read_ahead_waits_once_a_step(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), None)
    arguments = argparse.Namespace(batches=3, steps=2, compute=0.0)
    assert len(waited(str(tmp_path), None, 4, arguments)) == 2
