"""The reference run again, from the first stage to the last: every curve is the committed one.

What must not pass unseen (a wrong sign, a wrong factor, another draw, another default) is done on purpose here, and has
to be seen within the first steps of its stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import reference_run
from trainer.engine.network import Network
from trainer.engine.process_group import World
from trainer.stages import base, preference, progressive
from trainer.stages import stage as stage_module
from trainer.stages.dual_stream import algorithm as dual_stream

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    reference_run.train(folder)
    return folder


def test_every_curve_is_the_committed_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agrees = reference_run.report(run, reference_run.TOLERANCE)
    assert agrees, capsys.readouterr().out
    mine, theirs = reference_run.read_run(run), reference_run.read_reference()
    for stage, curves in theirs.items():
        assert set(mine[stage]) == set(curves), "curves were added or taken away: record the run anew"
        assert {len(curve) for curve in mine[stage].values()} == {len(next(iter(curves.values())))}
    assert (run / "comparison.png").stat().st_size > 10_000


def test_a_run_that_ends_early_or_leaves_a_stage_out_deviates() -> None:
    theirs = reference_run.read_reference()
    shorter = theirs | {"base": {name: curve[:-1] for name, curve in theirs["base"].items()}}
    without = {stage: curves for stage, curves in theirs.items() if stage != "preference"}
    for mine, stage in ((shorter, "base"), (without, "preference")):
        for deviation in reference_run.compare(mine, theirs):
            assert deviation.largest == (float("inf") if deviation.stage == stage else 0), deviation


def test_no_default_has_changed() -> None:
    recorded = (reference_run.RESULTS / "configuration.yaml").read_text()
    assert reference_run.changed_settings(reference_run.resolved_configuration(), recorded) == []
    now = reference_run.resolved_configuration(["trainer.dual_stream.time_shift=5.1"])
    assert reference_run.changed_settings(now, recorded) == ["trainer.dual_stream.time_shift: None -> 5.1"]


def _scaled(function: Any, factor: float) -> Any:
    return lambda *inputs, **options: factor * function(*inputs, **options)


def _scaled_gradient(function: Any, factor: float) -> Any:
    def scaled(*inputs: Any) -> Any:
        gradient, normaliser = function(*inputs)
        return factor * gradient, normaliser

    return scaled


def _other_draws(function: Any) -> Any:
    return lambda self, purpose, key: function(self, f"another {purpose}", key)


def _uphill(function: Any) -> Any:
    return lambda self, loss: function(self, -loss)


#: what is wrong -> (the first stage it shows in, object, attribute, how it is bent, its arguments)
BENT: dict[str, tuple[str, Any, str, Any, tuple[Any, ...]]] = {
    "base: target of the wrong sign": ("base", base, "velocity", _scaled, (-1,)),
    "base: loss by 1 % too large": ("base", base, "velocity_loss", _scaled, (1.01,)),
    "base: uphill": ("base", Network, "backward", _uphill, ()),
    "base: other draws": ("base", stage_module.Draws, "_generator", _other_draws, ()),
    "progressive: guided velocity by 1 % too large": ("progressive", progressive, "guided_velocity", _scaled, (1.01,)),
    "dual_stream: DMD of the wrong sign": ("dual_stream", dual_stream, "dmd_gradient", _scaled_gradient, (-1,)),
    "dual_stream: DMD by 2 % too large": ("dual_stream", dual_stream, "dmd_gradient", _scaled_gradient, (1.02,)),
    "dual_stream: L_G of the wrong sign": ("dual_stream", dual_stream, "generator_loss", _scaled, (-1,)),
    "dual_stream: L_D by 2 % too large": ("dual_stream", dual_stream, "discriminator_loss", _scaled, (1.02,)),
    "dual_stream: other draws": ("dual_stream", stage_module.Draws, "_generator", _other_draws, ()),
    "preference: β by 1 % too large": ("preference", preference, "dpo_loss", _scaled, (1.01,)),
}


@pytest.mark.parametrize("fault", BENT)
def test_a_fault_is_seen(fault: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, owner, name, bend, arguments = BENT[fault]
    monkeypatch.setattr(owner, name, bend(getattr(owner, name), *arguments))
    assert not agrees(stage, run, tmp_path)


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("base", "seed=1"),
        ("base", "base.time_shift=5.2"),
        ("base", "base.optimizer.learning_rate=2.1e-3"),
        ("progressive", "progressive.guidance_weight=3.05"),
        ("dual_stream", "dual_stream.gan_weight=0.105"),
        ("dual_stream", "dual_stream.shared_noise=false"),
        ("dual_stream", "dual_stream.fake_score.learning_rate=5.5e-4"),
        ("preference", "preference.beta=1010"),
    ],
)
def test_another_number_is_seen(stage: str, override: str, run: Path, tmp_path: Path) -> None:
    assert not agrees(stage, run, tmp_path, f"trainer.{override}")


def test_nothing_wrong_is_seen_in_the_first_steps(run: Path, tmp_path: Path) -> None:
    assert agrees("dual_stream", run, tmp_path)


def agrees(stage: str, run: Path, folder: Path, *overrides: str) -> bool:
    """Whether the first steps of a stage, from the models of `run`, are those of the reference."""
    finished = reference_run.train_stage(stage, run, overrides, into=folder / stage, stop_after=STEPS)
    assert not finished
    mine = reference_run.read_run(folder)
    theirs = {stage: reference_run.read_reference()[stage]}
    deviations = reference_run.compare(mine, theirs, STEPS)
    return max(d.largest for d in deviations) <= reference_run.TOLERANCE
