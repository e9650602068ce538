"""Wrong configuration gets one line that names the field, the value and the remedy."""

from pathlib import Path

import pytest
from pydantic import Field

from common.config import Section, load_section
from common.errors import UserError
from common.seeding import derive_seed, seeded_noise
from pipeline.model.config import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"


class Inner(Section):
    learning_rate: float = Field(1e-3, gt=0)


class Outer(Section):
    steps: int = 10
    inner: Inner = Inner()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: {stepz: 3}", "unknown key trainer.stepz; did you mean 'steps'?"),
        ("trainer: {inner: {learning_rat: 3}}", "trainer.inner.learning_rat; did you mean 'learning_rate'?"),
        ("trainer: {inner: {learning_rate: -1}}", "trainer.inner.learning_rate = -1: Input should be greater than 0"),
        ("trainers: {}", "unknown section 'trainers'; did you mean 'trainer'?"),
        ("- a list", "must hold sections"),
        ("a: [", "not valid YAML"),
    ],
)
def test_faults_are_named(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        load_section(write(tmp_path, text), "trainer", Outer)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_overrides_reach_nested_fields_and_are_checked(tmp_path):
    path = write(tmp_path, "trainer: {steps: 3}")
    loaded = load_section(path, "trainer", Outer, ["trainer.inner.learning_rate=0.5", "model.shift=2"])
    assert loaded.steps == 3 and loaded.inner.learning_rate == 0.5
    with pytest.raises(UserError, match=r"trainer\.steps = 'many'"):
        load_section(path, "trainer", Outer, ["trainer.steps=many"])
    with pytest.raises(UserError, match=r"write section\.field=value"):
        load_section(path, "trainer", Outer, ["steps"])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no configuration file .*nowhere\.yaml"):
        load_section(tmp_path / "nowhere.yaml", "trainer", Outer)


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_presets_are_valid(preset):
    assert load_section(preset, "model", ModelConfig).transformer.num_layers >= 1


def test_seeds_depend_on_every_part_and_nothing_else():
    assert derive_seed(1, "a") == derive_seed(1, "a") == derive_seed("1", "a")
    assert (
        len({derive_seed(1, "a"), derive_seed(1, "b"), derive_seed(2, "a"), derive_seed("1a"), derive_seed("a", 1)})
        == 5
    )
    assert seeded_noise((4,), 1, "a").equal(seeded_noise((4,), 1, "a"))


def test_a_deviation_without_the_skip_is_refused(tmp_path):
    text = "model: {vae: v, prompts: p, transformer: {low_resolution_deviation: 0.25}}"
    with pytest.raises(UserError, match="means nothing without low_resolution_skip: true"):
        load_section(write(tmp_path, text), "model", ModelConfig)
