"""What a job surveys again: what was added, what has changed, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from common.config import load_section
from common.lossless_clip import write_lossless
from common.storage import StorageConfig, open_folder
from datagen.config import DatagenConfig
from datagen.sources import find_sources
from datagen.survey.source_survey import SourceSurvey
from datagen.survey.survey_cache import Survey, survey_all
from tests.datagen.conftest import moving_picture

STORAGE = StorageConfig()


@pytest.mark.distributed
def test_an_added_and_a_changed_source_cost_their_own_survey(
    shared_ray: None, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_section(config_file, "datagen", DatagenConfig)
    inputs, folder = tmp_path / "in", open_folder(tmp_path / "out")
    asked: list[None] = []

    def survey(config: DatagenConfig = config) -> dict[str, Survey]:
        asked.clear()
        sources = find_sources([str(inputs)], STORAGE)
        found = survey_all(folder, sources, config, STORAGE, lambda: asked.append(None))
        return {of.source.id: of for of in found}

    for name in "bd":
        write_lossless(inputs / f"{name}.mkv", moving_picture(9, 64, 64, ord(name)))
    first = survey()
    assert "survey: 2/2" in capsys.readouterr().err and asked
    assert survey() == first and not asked  # and no Ray

    write_lossless(inputs / "a.mkv", moving_picture(9, 64, 64, 0))
    write_lossless(inputs / "d.mkv", moving_picture(18, 64, 64, 0))
    second = survey()
    assert "survey: 2/2" in capsys.readouterr().err
    assert list(second) == ["a.mkv", "b.mkv", "d.mkv"] and second["b.mkv"] == first["b.mkv"]
    changed = second["d.mkv"]
    assert isinstance(changed, SourceSurvey) and changed.frames == 18
    assert sorted(folder.sizes()) == ["survey/part-000000.json", "survey/part-000001.json"]
    assert survey() == second and not asked

    # moved with its times, under the same names: nothing; in other windows: everything
    shutil.copytree(inputs, tmp_path / "moved")
    inputs = tmp_path / "moved"
    assert [os.path.dirname(of.source.path) for of in survey().values()] == [str(inputs)] * 3 and not asked
    survey(config.model_copy(update={"clip": config.clip.model_copy(update={"stride": 4})}))
    assert "survey: 3/3" in capsys.readouterr().err
