"""`make demo` keeps the configuration it began with, and what that extends; its list of steps goes on where it was."""

import sys
from pathlib import Path

import pytest

from common.config import load_section
from demo.run import keep_config
from launchers.steps import Step, StepFailed, StepRunner
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


def test_a_failed_list_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is done is not done again, and its seconds count in the estimate."""
    missing = tmp_path / "it's needed"
    append = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write('x')"
    lines = ("-c", append, str(tmp_path / "first")), ("-c", "import sys; open(sys.argv[1])", str(missing))
    steps = [Step(name, name, (sys.executable, *line), 60) for name, line in zip("ab", lines, strict=True)]
    runner = StepRunner(tmp_path / "steps", steps)
    runner.run(steps[0])
    with pytest.raises(StepFailed, match=r"b failed with status 1[\s\S]*No such file"):
        runner.run(steps[1])
    said = capsys.readouterr().out.splitlines()
    assert "step 1 of 2: a … (about 2 min left)" in said[0] and "(about 1 min left)" in said[2]

    missing.touch()
    again = StepRunner(tmp_path / "steps", steps)
    for step in steps:
        again.run(step)
    assert (tmp_path / "first").read_text() == "x" and "a done before" in capsys.readouterr().out
    assert again.seconds["a"] == pytest.approx(runner.seconds["a"], abs=0.01) and set(again.seconds) == {"a", "b"}
