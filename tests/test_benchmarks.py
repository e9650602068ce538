"""The benchmarks start as files from anywhere, and Stage II's round costs what the README says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.dual_stream_step import SHAPES, count_flops
from benchmarks.effect.ablations import Order, judged
from benchmarks.effect.held_out import CLIPS
from benchmarks.effect.train import CONFIG, ROWS, chain, parse_arguments, plan
from benchmarks.inference import STEPS, time_command, time_model
from benchmarks.read_ahead import waited, write_dataset
from benchmarks.upscale import moving
from benchmarks.validation_cost import shares
from common.config import load_section
from common.errors import UserError
from launchers.steps import StepRunner
from pipeline.model.transformer import tapped_layers
from pipeline.upscale_options import DEFAULT_MODEL
from tests.commands import run
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
    done = run(FOLDER / script, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_a_round_needs_0_73_of_the_operations_of_a_literal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last operation what benchmarks/results records. They are linear in the blocks and in the last tapped one,
    and counting takes as long as there are blocks: so few with three taps give the number of thirty."""
    size = argparse.Namespace(frames=21, height=720, width=1280, batch=1)
    counts, taps = {}, {3: 3, 4: 4, 5: 4, 30: 27}
    for blocks, last in taps.items():
        assert tapped_layers(blocks)[-1] == last
        if blocks < 30:
            monkeypatch.setitem(SHAPES, "wan-1.3b", {"num_layers": blocks})
            counts[blocks] = count_flops(size, ("ours", "literal"))
    recorded = json.loads((FOLDER / "results/dual_stream_step_cpu.txt").read_text().splitlines()[-1])
    for name in ("ours", "literal"):
        three, four, five = (counts[blocks][name] for blocks in (3, 4, 5))
        block, tap = five - four, four - three - (five - four)
        assert three + (30 - 3) * block + (27 - 3) * tap == recorded["flops"][name]
    assert recorded["flops_ratio"] == pytest.approx(0.7307, abs=1e-4)


def test_inference_times_each_step_of_a_model() -> None:
    given = argparse.Namespace(
        model=DEFAULT_MODEL, device="cpu", dtype="fp32", repeats=2, transformer_tile=None, vae_tile=None
    )
    found = time_model(moving(16, 16, 5), given)
    assert {step: len(values) for step, values in found["seconds"].items()} == dict.fromkeys(STEPS, 2)
    assert all(value > 0 for values in found["seconds"].values() for value in values)
    assert found["dit_evaluations"] == 1 and found["parameters"]["transformer"] > 10**6 < found["peak_bytes"]


def test_inference_times_a_command_that_leaves_every_frame() -> None:
    frames = moving(16, 16, 3)
    command = "sh -c 'cp -r {input}/. {output}; sleep 0.3'"  # long enough for a look at its memory
    found = time_command(frames, argparse.Namespace(command=command, repeats=2))
    assert len(found["seconds"]["command"]) == 2 and found["peak_bytes"] > 0
    with pytest.raises(UserError, match="status 0 and 0 of 3 frames"):
        time_command(frames, argparse.Namespace(command="true {input} {output}", repeats=1))
    with pytest.raises(UserError, match=r"needs .input. and .output."):
        time_command(frames, argparse.Namespace(command="true", repeats=1))


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


def test_every_row_is_planned_once_after_what_it_needs(tmp_path: Path) -> None:
    planned = plan(parse_arguments(["--data", "shards", "--output", str(tmp_path), "--seeds", "0,1"]))
    StepRunner(tmp_path / "steps", planned)
    names = [step.name for step in planned]
    # two rows of Stage III share the pairs of Stage II's student, one has those of Stage I's
    assert len(names) == len(set(names)) == 1 + 2 * (len(ROWS) + 2)
    made = {str(tmp_path / "base" / "model")}
    for step in planned:
        words = step.command
        given = [words[words.index(option) + 1] for option in ("--init", "--teacher", "--model") if option in words]
        assert all(folder.removesuffix("/teacher").removesuffix("/model") in made or folder in made for folder in given)
        made.add(words[words.index("--output") + 1])


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


def test_an_order_holds_where_clips_and_training_seeds_agree() -> None:
    """Differences by clip that lie between 0.5 and 1; in the third row the second training seed disagrees."""
    steps = [0.5 + 0.1 * number for number in range(len(CLIPS))]

    def row(*factors: float) -> dict[int, dict[str, dict[str, float]]]:
        values = {clip.name: step for clip, step in zip(CLIPS, steps, strict=True)}
        return {
            seed: {name: {"niqe": 5 - factor * step, "psnr": 20 + factor * step} for name, step in values.items()}
            for seed, factor in enumerate(factors)
        }

    values = {"low": row(0, 0), "high": row(1, 2), "unsteady": row(3, -0.1), "once": row(0)}
    order = Order("", "high", "low", "")
    mean = 1.5 * sum(steps) / len(steps)
    for metric, sign in (("niqe", "-"), ("psnr", "")):
        verdict, shown = judged(values, order, metric) or ("", "")
        assert verdict == "holds" and shown.startswith(f"{sign}{mean:.2f}"), shown
        assert (judged(values, order._replace(better="low", worse="high"), metric) or "")[0] == "is refuted"
        assert (judged(values, order._replace(better="unsteady"), metric) or "")[0] == "undecided"
        assert (judged(values, order._replace(worse="once"), metric) or "")[0] == "holds"
    assert judged(values, order._replace(worse="missing"), "psnr") is None
