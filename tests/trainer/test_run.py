"""trainer/run.py as people start it: through the deepspeed launcher, on two ranks, with all its ways of refusing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.storage import open_folder
from datagen.dataset.shard_format import Sidecar, Split, write_manifest, write_shard
from pipeline.vsr_pipeline import open_pipeline
from tests.trainer.presets import CLIPS, clip, losses, run_command, write_preset
from tests.trainer.stages import make_run
from trainer import run as command
from trainer.engine.process_group import World
from trainer.loop import train_loop
from trainer.preemption import EXIT_SAVED_ON_SIGNAL
from trainer.train import train

#: two steps, validated after the second
TWO_STEPS = [
    part for setting in ("steps=2", "validate_every=2") for part in ("--set", f"trainer.schedules.base.{setting}")
]

ZERO_3 = ("--set", "trainer.engine.zero_stage=3")


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset"))


def arguments(preset: Path, stage: str, output: Path, *more: object) -> list[object]:
    data = preset.parent / ("pairs" if stage == "preference" else "clips")
    return ["--config", preset, "--stage", stage, "--data", data, "--output", output / stage, *more]


@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_two_ranks_at_zero_3_through_all_stages(preset: Path, tmp_path: Path, world: World) -> None:
    models = {
        "base": (),
        "progressive": ("--init", tmp_path / "base/model"),
        "dual_stream": ("--init", tmp_path / "progressive/model", "--teacher", tmp_path / "progressive/teacher"),
        "preference": ("--init", tmp_path / "dual_stream/model"),
    }
    alone = make_run(preset, "base", tmp_path / "alone", world)
    assert train_loop(alone)
    for stage, roles in models.items():
        line = arguments(preset, stage, tmp_path, *roles)
        if stage == "base":
            # Two ranks at ZeRO-3 begin, one rank at ZeRO-1 goes on from their checkpoint.
            begun = run_command(*line, *ZERO_3, "--stop-after", 3, ranks=2)
            assert begun.returncode == EXIT_SAVED_ON_SIGNAL, begun.stderr
            done = run_command(*line, warm=False)
        else:
            done = run_command(*line, *ZERO_3, ranks=2)
        assert done.returncode == 0, done.stderr
        pipeline = open_pipeline(tmp_path / stage / "model")
        assert pipeline.config.num_inference_steps == (4 if stage == "base" else 1)
        result = pipeline(np.zeros((5, 8, 8, 3), np.uint8))
        assert result.frames.shape == (5, 32, 32, 3)
    for mine, theirs in zip(losses(tmp_path / "base"), losses(tmp_path / "alone"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert open_pipeline(tmp_path / "progressive/teacher").config.num_inference_steps == 4


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("base", ["--config", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        ("base", ["--data", "nowhere"], "nowhere/manifest.json does not exist"),
        ("base", ["--init", "nowhere"], "--init nowhere: no such model folder"),
        ("base", ["--teacher", "."], "--stage base takes no --teacher"),
        ("base", ["--set", "model.vae=nowhere"], "no VAE in nowhere"),
        ("base", ["--set", "model.prompts=nowhere"], "no prompt cache in nowhere"),
        ("base", ["--set", "model.initial_weights=nowhere"], "no model folder nowhere"),
        ("base", ["--set", "trainer.schedules.base.global_batch_size=0"], "global_batch_size = 0"),
        ("base", ["--set", "trainer.engine_overrides.critik={}"], "unknown network 'critik'"),
        ("progressive", [], "starts from the base model: give its folder with --init"),
        ("dual_stream", ["--init", "."], "needs Stage I's teacher folder"),
        ("preference", ["--init", "RANDOM", "--data", "CLIPS"], "samples have no member 'pair'"),
    ],
)
def test_bad_input(
    stage: str,
    more: list[str],
    message: str,
    preset: Path,
    tmp_path: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "RANDOM" in more:
        model = make_run(preset, "base", tmp_path / "random", world).stage.exported.module
        model.save_pretrained(tmp_path / "random" / "transformer")
    places = {"RANDOM": str(tmp_path / "random"), "CLIPS": str(preset.parent / "clips")}
    line = [*arguments(preset, stage, tmp_path / "out"), *(places.get(word, word) for word in more)]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, line)])
    with pytest.raises(UserError) as error:
        command.main()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_data_and_output_are_asked_for(preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--config", str(preset), "--stage", "base"])
    with pytest.raises(UserError, match="--data and --output"):
        command.main()


def write_side(folder: Path, samples: range, split: Split | None, index: int = 0) -> Sidecar:
    return write_shard(open_folder(folder), index, [clip(number) for number in samples], split=split)


@pytest.mark.distributed
def test_training_and_validation_look_at_their_side_of_a_split(preset: Path, tmp_path: Path) -> None:
    """A split dataset gives the run that two folders give; one without a split is trained on whole, not looked at."""
    folders = {"both": [("train", range(8)), ("validation", range(8, 12))], "train": [(None, range(8))]}
    folders |= {"held": [(None, range(8, 12))], "all": [(None, range(12))]}
    for name, parts in folders.items():
        shards = [write_side(tmp_path / name, part, split, i) for i, (split, part) in enumerate(parts)]
        write_manifest(open_folder(tmp_path / name), "clips", shards)
    runs = {"both": (), "train": ("--validation-data", tmp_path / "held"), "all": ()}
    said = {}
    for name, more in runs.items():
        line = ["--config", preset, "--stage", "base", *TWO_STEPS, "--data", tmp_path / name, *more]
        done = run_command(*line, "--output", tmp_path / f"run-{name}")
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    both, separate, mixed = (losses(tmp_path / f"run-{name}") for name in runs)
    assert any("validation/z_lr/psnr" in row for row in both)
    assert both == separate
    assert len(mixed) == 2 and not any(name.startswith("validation") for row in mixed for name in row)
    assert not (tmp_path / "run-all/previews").exists()
    assert f"validation: held-out clips of {tmp_path / 'both'}" in said["both"] and "validation:" not in said["train"]
    remedy = "build its shards with datagen.validation_share, or give --validation-data"
    assert f"validation: off; {tmp_path / 'all'} holds no clips out: {remedy}\n" in said["all"]


def test_validation_on_training_clips_is_refused(preset: Path, tmp_path: Path, world: World) -> None:
    clips = preset.parent / "clips"
    line = ["--config", preset, "--stage", "base", *TWO_STEPS, "--data", clips, "--output", tmp_path / "run"]
    # a copy of a shard under another number
    shard = write_side(tmp_path / "copy", range(CLIPS // 2), None, index=3)
    write_manifest(open_folder(tmp_path / "copy"), "clips", [shard])
    for folder in (clips, tmp_path / "copy"):
        arguments = command.parse_arguments([*map(str, line), "--validation-data", str(folder)])
        with pytest.raises(UserError, match=r"shards/shard-00000.\.tar is a shard of --data .*/clips, too"):
            train(command.training_job(arguments))
    assert not list((tmp_path / "run").glob("*.jsonl"))
