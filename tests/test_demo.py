"""`make demo` keeps the configuration it began with, and what that extends."""

from pathlib import Path

import pytest

from common.config import load_section
from demo.run import keep_config
from demo.steps import StepFailed
from trainer.config import TrainerConfig

ROOT = Path(__file__).resolve().parents[1]


def test_the_kept_configuration_is_the_one_of_the_repository(tmp_path: Path) -> None:
    kept = keep_config(ROOT / "configs/demo.yaml", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"demo.yaml", "small.yaml"}
    expected = load_section(ROOT / "configs/demo.yaml", "trainer", TrainerConfig)
    assert load_section(Path(kept), "trainer", TrainerConfig) == expected


@pytest.mark.parametrize("name", ["demo.yaml", "small.yaml"])
def test_a_demo_begun_with_another_configuration_is_refused(tmp_path: Path, name: str) -> None:
    keep_config(ROOT / "configs/demo.yaml", tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "# older\n")
    with pytest.raises(StepFailed, match=f"was begun with another .*{name}"):
        keep_config(ROOT / "configs/demo.yaml", tmp_path)
