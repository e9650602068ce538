"""docs/extending.md is run as it stands: its blocks become files of a project outside the repository."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.config import load_section
from common.errors import UserError
from datagen.config import DatagenConfig
from datagen.degradation.degrade import degrade_clip
from datagen.degradation.registry import describe
from pipeline.vsr_pipeline import open_pipeline
from tests.commands import ROOT, run
from tests.trainer.presets import run_command, write_preset

PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the page's files and the toy preset, on the path of this process and its children."""
    folder = tmp_path_factory.mktemp("project")
    write_preset(folder)
    names = []
    for name, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.S):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        names.append(name)
    assert len(names) == len(re.findall(r"```(?:python|yaml)\n", PAGE)) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield folder


@pytest.mark.distributed
def test_a_stage_of_another_project_trains_resumes_and_exports(project: Path, tmp_path: Path) -> None:
    preset, clips = project / "preset.yaml", project / "clips"
    base = run_command("--config", preset, "--stage", "base", "--data", clips, "--output", tmp_path / "base")
    assert base.returncode == 0, base.stderr
    line = ["--config", project / "fidelity.yaml", "--stage", "my_project.fidelity:SPEC", "--data", clips]
    line += ["--init", tmp_path / "base" / "model"]
    stopped = run_command(*line, "--output", tmp_path / "cut", "--stop-after", 1, ranks=2)
    assert "saved; run the same command again" in stopped.stdout, stopped.stderr
    resumed = run_command(*line, "--output", tmp_path / "cut", ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    alone = run_command(*line, "--output", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    losses = {
        name: [row["loss"] for row in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in row]
        for name in ("cut", "alone")
    }
    assert len(losses["alone"]) == 2 and losses["cut"] == pytest.approx(losses["alone"], rel=1e-4)
    assert open_pipeline(tmp_path / "cut" / "model").config.num_inference_steps == 1


@pytest.mark.distributed
def test_a_stage_of_another_project_is_checked_and_planned(project: Path) -> None:
    line = ["--config", project / "fidelity.yaml", "--stage", "my_project.fidelity:SPEC"]
    plan = run_command(*line, "--dry-run", "--gpus", 2)
    assert plan.returncode == 0 and "weight: 2.0" in plan.stdout and "student" in plan.stdout, plan.stderr
    wrong = run_command(*line, "--dry-run", "--gpus", 2, "--set", "trainer.fidelity.weight=-1")
    assert wrong.returncode == 2 and "trainer.fidelity.weight = -1" in wrong.stderr
    alone = run_command(*line, "--data", project / "clips", "--output", project / "none")
    assert alone.returncode == 2 and "starts from a one-step student: give its folder with --init" in alone.stderr
    absent = run_command("--config", project / "preset.yaml", "--stage", "my_project.fidelity:ABSENT", "--dry-run")
    assert absent.returncode == 2 and "has no ABSENT" in absent.stderr


@pytest.mark.distributed
def test_a_metric_of_another_project_scores(project: Path, tmp_path: Path) -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    np.save(tmp_path / "hr.npy", frames)
    np.save(tmp_path / "out.npy", frames + 51)
    line = ["--video", tmp_path / "out.npy", "--reference", tmp_path / "hr.npy", "--output", tmp_path / "m.json"]
    done = run("-m", "metrics.evaluate", *line, "--metrics", "psnr,my_project.mae:Mae")
    assert done.returncode == 0, done.stderr
    assert "MAE ↓" in done.stdout
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["metrics"]["mae"] == pytest.approx(0.2) and result["lower_is_better"]["mae"]


def test_an_operation_of_another_project_degrades(project: Path) -> None:
    clip = np.full((3, 64, 64, 3), 200, np.uint8)
    mixture = load_section(project / "vignette.yaml", "datagen", DatagenConfig).degradation
    lr, draws = degrade_clip(clip, mixture, 7)
    again, _ = degrade_clip(clip, mixture, 7)
    assert np.array_equal(lr, again)
    plain, without = degrade_clip(clip, "realbasicvsr", 7)
    reference = "my_project.vignette:Vignette"
    (extra,) = [drawn for drawn in draws["operations"] if drawn["op"] == reference]
    assert 0.2 <= extra["corners"] <= 0.4
    assert [drawn for drawn in draws["operations"] if drawn is not extra] == without["operations"]
    assert lr[:, 0, 0].mean() < plain[:, 0, 0].mean() - 30, "the corners are darker"
    assert "vignette" in describe(draws["operations"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("operation: 'my_project.absent:Vignette'", "No module named 'my_project.absent'"),
        ("operation: 'my_project.mae:Mae'", "not a subclass of Operation"),
        ("operation: 'my_project.vignette:Vignette', config: {corners: [0.9, 0.1]}", "from low to high"),
    ],
)
def test_a_wrong_operation_is_named_when_the_preset_is_read(project: Path, change: str, message: str) -> None:
    override = f"datagen.degradation={{weights: {{a: 1}}, recipes: {{a: {{extra: [{{{change}}}]}}}}}}"
    with pytest.raises(UserError, match=message) as error:
        load_section(project / "preset.yaml", "datagen", DatagenConfig, [override])
    assert "\n" not in str(error.value)
