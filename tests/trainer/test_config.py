"""The trainer's section: presets, ablations, and mistakes named with their remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import load_section
from common.errors import UserError
from datagen.config import DatagenConfig
from pipeline.model.config import ModelConfig
from trainer.config import TrainerConfig
from trainer.stages import STAGES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAPER = CONFIGS / "wan-1.3b.yaml"
ABLATIONS = sorted((CONFIGS / "ablations").glob("*.yaml"))


def differences(a: Any, b: Any, path: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return {line for key in {*a, *b} for line in differences(a.get(key), b.get(key), f"{path}.{key}".strip("."))}
    return set() if a == b else {path}


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_differs_from_the_paper_where_it_says(path: Path) -> None:
    paper, ablation = (load_section(p, "trainer", TrainerConfig).model_dump() for p in (PAPER, path))
    stages = yaml.safe_load(path.read_text())["trainer"]
    named = {f"{stage}.{field}" for stage, fields in stages.items() for field in fields}
    assert differences(paper, ablation) == named, "every value given is one that differs"
    assert load_section(path, "model", ModelConfig) == load_section(PAPER, "model", ModelConfig)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_that_validates_holds_clips_out(path: Path) -> None:
    schedules = load_section(path, "trainer", TrainerConfig).schedules
    validates = any(schedules[name].validate_every for name in ("base", "progressive", "dual_stream", "preference"))
    assert validates == (load_section(path, "datagen", DatagenConfig).validation_share > 0)


def test_numbers_of_the_paper() -> None:
    config = load_section(PAPER, "trainer", TrainerConfig)
    stage = config.dual_stream
    assert (stage.auxiliary_updates, stage.dmd_weight, stage.gan_weight, stage.feature_matching_weight) == (
        3,
        1,
        0.1,
        0.05,
    )
    assert config.progressive.schedule == (32, 16, 8, 4, 2, 1) and config.progressive.iterations_per_halving == 500
    assert config.steps_of(STAGES["progressive"]) == 2000 + 6 * 500
    assert config.steps_of(STAGES["preference"]) == 1000
    assert config.preference.beta == 1000 and config.preference.operating_point == "one_step"
    assert config.base.low_resolution_noise == (200, 600) and config.base.null_prompt_probability == 0.1


def test_a_network_may_be_sharded_its_own_way() -> None:
    """Overrides refine `engine`: what they don't name stays as it is there."""
    config = TrainerConfig(
        engine={"precision": "fp32", "gradient_accumulation": 4}, engine_overrides={"real_score": {"zero_stage": 2}}
    )
    refined = config.engine_of("real_score")
    assert (refined.zero_stage, refined.precision, refined.gradient_accumulation) == (2, "fp32", 4)
    assert config.engine_of("student").zero_stage == 3


def test_a_schedule_refines_the_stages_own_default() -> None:
    config = TrainerConfig(schedules={"dual_stream": {"global_batch_size": 64}})
    assert config.schedules["dual_stream"].global_batch_size == 64
    assert config.steps_of(STAGES["dual_stream"]) == 5000 and config.steps_of(STAGES["base"]) == 100_000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.dual_stream.gan_wieght=1", "unknown key trainer.dual_stream.gan_wieght; did you mean 'gan_weight'?"),
        ("trainer.engine.zero_stage=4", "trainer.engine.zero_stage = 4"),
        ("trainer.progressive.schedule=[4,3,1]", "must halve at every entry"),
        ("trainer.tracking.wandb=maybe", "trainer.tracking.wandb = 'maybe'"),
        ("trainer.engine_overrides={judge: {}}", "unknown network 'judge'; known: codec, critic, discriminator"),
        ("trainer.engine_overrides={critic: {stage: 3}}", "unknown key critic.stage; known: zero_stage"),
        ("trainer.engine_overrides={critic: {zero_stage: 4}}", "critic.zero_stage = 4: Input should be 1, 2 or 3"),
        ("trainer.engine_overrides={teacher: {zero_stage: 2}}", "so zero_stage has to be the same, not 2 and 1"),
        ("trainer.engine_overrides={critic: {gradient_accumulation: 2}}", "give both the same gradient_accumulation"),
        ("trainer.engines={critic: {}}", "trainer.engines is now called trainer.engine_overrides"),
        ("trainer.schedules.dualstream.steps=3", "unknown stage 'dualstream'; known: codec, base, progressive"),
        ("trainer.schedules.base.stepz=3", "unknown key trainer.schedules.base.stepz; did you mean 'steps'?"),
        ("trainer.schedules.progressive.steps=9", "progressive.steps = 9: the number of updates follows from"),
        ("trainer.dual_stream={dmd_weight: 0, gan_weight: 0, feature_matching_weight: 0}", "there is no loss"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_section(PAPER, "trainer", TrainerConfig, [override])
    assert message in str(error.value) and str(PAPER) in str(error.value)


def test_extending_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text("trainer: {seed: 1, progressive: {schedule: [2, 1], guidance_weight: 2}}")
    child = tmp_path / "child.yaml"
    child.write_text("extends: parent.yaml\ntrainer: {progressive: {schedule: [1]}}")
    config = load_section(child, "trainer", TrainerConfig)
    assert (config.seed, config.progressive.schedule, config.progressive.guidance_weight) == (1, (1,), 2)
    child.write_text("extends: child.yaml")
    with pytest.raises(UserError, match="extends itself"):
        load_section(child, "trainer", TrainerConfig)
    child.write_text("extends: nowhere.yaml")
    with pytest.raises(UserError, match=r"no configuration file .*nowhere.yaml"):
        load_section(child, "trainer", TrainerConfig)
