"""The prediction of z_HR from z_LR is trained by the students of Stages II and III, and by no other network."""

from __future__ import annotations

import pytest
import torch
import yaml

from pipeline.model.config import TransformerConfig
from pipeline.model.load_weights import load_transformer
from pipeline.model.low_resolution_skip import LowResolutionPredictor
from pipeline.model.transformer import VSRTransformer
from tests.trainer.presets import run_command, write_preset
from tests.trainer.stages import make_run

SKIP = {
    "low_resolution_skip": True, "low_resolution_deviation": 0.5, "low_resolution_predictor": True,
    "predictor_blocks": 1, "predictor_width": 8, "residual_input": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "trained"),
    [("base", set()), ("progressive", set()), ("dual_stream", {"student"}), ("preference", {"student"})],
)
def test_who_trains_the_prediction(tmp_path, world, stage, trained) -> None:
    preset = write_preset(tmp_path)
    values = yaml.safe_load(preset.read_text())
    values["model"]["transformer"] |= SKIP
    preset.write_text(yaml.safe_dump(values))
    run = make_run(preset, stage, tmp_path / stage, world)
    for network in run.stage.networks.values():  # a zero output layer would pass no gradient on
        for parameter in (p for part in predictors(network.module) for p in part.parameters()):
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn_like(parameter))
    before = {name: weights(network.module) for name, network in run.stage.networks.items()}
    batches = iter(run.reader)
    for step in range(2):
        run.stage.train_step(step, [next(batches) for _ in range(run.stage.batches_per_step)])
    after = {name: weights(network.module) for name, network in run.stage.networks.items()}
    assert all(values.numel() for values in after.values())
    assert {name for name in after if not torch.equal(before[name], after[name])} == trained


def predictors(module: torch.nn.Module) -> list[LowResolutionPredictor]:
    return [part for part in module.modules() if isinstance(part, LowResolutionPredictor)]


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for part in predictors(module) for p in part.parameters()])


def test_what_is_kept_is_exported_as_it_was(tmp_path) -> None:
    """Base and Stage I by the real command: every model they leave has the prediction they were given."""
    preset = write_preset(tmp_path)
    values = yaml.safe_load(preset.read_text())
    values["model"]["transformer"] |= SKIP
    torch.manual_seed(0)
    first = VSRTransformer(**TransformerConfig(**values["model"]["transformer"]).model_dump())
    first.save_pretrained(tmp_path / "first")
    values["model"]["initial_weights"] = str(tmp_path / "first")
    preset.write_text(yaml.safe_dump(values))
    line = ["--config", preset, "--data", tmp_path / "clips"]
    for stage, init in (("base", ()), ("progressive", ("--init", tmp_path / "base" / "model"))):
        done = run_command(*line, "--stage", stage, *init, "--output", tmp_path / stage)
        assert done.returncode == 0, done.stderr
    for model in ("base/model", "progressive/teacher", "progressive/model"):
        exported = load_transformer(tmp_path / model, TransformerConfig(**values["model"]["transformer"]))
        assert torch.equal(weights(exported), weights(first))
        assert not torch.equal(exported.blocks[0].attn1.to_q.weight, first.blocks[0].attn1.to_q.weight)
