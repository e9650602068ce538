"""What a stage leaves behind opens as a pipeline, holds the EMA, and tells where it comes from."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from common.errors import UserError
from pipeline.model.config import ModelConfig
from pipeline.model.prompts import DEFAULT_PROMPT, load_prompts
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import load_vae
from pipeline.vsr_pipeline import open_pipeline
from tests.trainer.presets import CLIPS, clip, write_dataset, write_preset
from tests.trainer.stages import make_run
from trainer import run as command
from trainer.engine.process_group import World
from trainer.export import export_model
from trainer.loop import train_loop
from trainer.train import train

CARD = {"stage": "base", "data": {"samples": 12}, "code": "v1", "metrics": {"validation/psnr": 30.5}}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset"))


def model_of(preset: Path) -> ModelConfig:
    return ModelConfig(**yaml.safe_load(preset.read_text())["model"])


def export(preset: Path, folder: Path, state: dict[str, torch.Tensor], **changes: Any) -> None:
    model = model_of(preset)
    values: dict[str, Any] = {"steps": 4, "guidance_weight": 0.5, "card": CARD} | changes
    export_model(folder, state, model, load_vae(model.vae), load_prompts(model.prompts), **values)


def test_the_folder_holds_the_ema(preset: Path, tmp_path: Path, world: World) -> None:
    run = make_run(preset, "base", tmp_path / "run", world)
    assert train_loop(run)
    ema, last = (run.stage.exported.full_state_dict(ema=ema) for ema in (True, False))
    export(preset, tmp_path / "model", ema)
    pipeline = open_pipeline(tmp_path / "model")
    found = dict(pipeline.transformer.named_parameters())
    assert found.keys() == ema.keys()
    assert all(torch.equal(found[name], ema[name]) for name in ema)
    assert any(not torch.equal(found[name], last[name]) for name in ema), "the EMA lags behind the weights"
    config = pipeline.config
    assert (config.num_inference_steps, config.guidance_weight, config.shift) == (4, 0.5, 5.0)
    model = model_of(preset)
    assert all(map(torch.equal, pipeline.vae.parameters(), load_vae(model.vae).parameters()))
    assert torch.equal(pipeline.prompts.embed([DEFAULT_PROMPT]), load_prompts(model.prompts).embed([DEFAULT_PROMPT]))


def test_the_best_checkpoint_is_exported_on_request(
    preset: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate that only does harm, the last validation is not the best."""
    schedule = "steps: 3, global_batch_size: 4, checkpoint_every: 1, validate_every: 1"
    changes = [f"trainer.schedules.base={{{schedule}}}", "trainer.base.optimizer={learning_rate: 0.5}"]
    write_dataset(tmp_path / "held-out", "clips", lambda index: clip(CLIPS + index))
    line = ["--config", preset, "--stage", "base", "--data", preset.parent / "clips", "--output", tmp_path / "run"]
    line += [word for change in changes for word in ("--set", change)]

    def weights(export: str) -> tuple[torch.Tensor, str]:
        arguments = command.parse_arguments([*map(str, line), "--export", export])
        assert train(command.training_job(arguments))
        folder = tmp_path / "run/model"
        return open_pipeline(folder).transformer.proj_out.weight, (folder / "README.md").read_text()

    with pytest.raises(UserError, match=r"no checkpoint is the best without validation; .* holds no clips out"):
        weights("best")
    line += ["--validation-data", tmp_path / "held-out"]
    last, _ = weights("last")
    best, card = weights("best")  # the run is finished: this only exports
    kept = tmp_path / "run/checkpoints"
    record = json.loads((kept / "best.json").read_text())
    assert record["step"] < 3 and f'"{record["number"]}": {record["value"]}' in card
    found = load_file(kept / f"step-{record['step']:08d}" / "student" / "rank-00000.safetensors")[
        "ema/0/proj_out.weight"
    ]
    assert torch.equal(best.flatten(), found) and not torch.equal(best, last)
    with pytest.raises(UserError, match=r"no best checkpoint is kept, as .*keep_best is null"):
        line += ["--set", f"trainer.schedules.base={{{schedule}, keep_best: null}}"]
        weights("best")


def state_of(preset: Path, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return VSRTransformer(**model_of(preset).transformer.model_dump()).state_dict()


def test_the_card_tells_the_origin(preset: Path, tmp_path: Path) -> None:
    export(preset, tmp_path / "model", state_of(preset, 0))
    card = (tmp_path / "model" / "README.md").read_text()
    for fact in ("stage base", "in 4 steps", '"samples": 12', '"code": "v1"', '"validation/psnr": 30.5'):
        assert fact in card


def test_an_older_model_is_replaced_and_a_failed_one_leaves_it(preset: Path, tmp_path: Path) -> None:
    old, new = state_of(preset, 0), state_of(preset, 1)
    export(preset, tmp_path / "model", old)
    export(preset, tmp_path / "model", new)
    weights = open_pipeline(tmp_path / "model").transformer.state_dict()
    assert torch.equal(weights["proj_out.weight"], new["proj_out.weight"])
    with pytest.raises(RuntimeError, match=r"proj_out\.weight"):
        export(preset, tmp_path / "model", {name: value for name, value in old.items() if name != "proj_out.weight"})
    weights = open_pipeline(tmp_path / "model").transformer.state_dict()
    assert torch.equal(weights["proj_out.weight"], new["proj_out.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_older_model(preset: Path, tmp_path: Path) -> None:
    export(preset, tmp_path / "model", state_of(preset, 0))
    before = (tmp_path / "model" / "README.md").read_text()
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # no file may grow beyond 8 KiB
    try:
        with pytest.raises(UserError, match=r"cannot write .*model.*; free space"):
            export(preset, tmp_path / "model", state_of(preset, 1), card=CARD | {"stage": "newer"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "model" / "README.md").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_in_bf16(preset: Path, tmp_path: Path) -> None:
    export(preset, tmp_path / "model", state_of(preset, 0), dtype=torch.bfloat16)
    saved = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert saved["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("stage", ["progressive", "dual_stream", "preference"])
def test_every_network_of_a_stage_is_compiled(preset: Path, stage: str, tmp_path: Path, world: World) -> None:
    """Copies too: a copy of a compiled module is not compiled."""
    run = make_run(preset, stage, tmp_path / "run", world, compile_blocks=True)
    for name, network in run.stage.networks.items():
        model = getattr(network.module, "transformer", network.module)
        assert all(block._compiled_call_impl is not None for block in model.blocks), name


def test_the_fake_score_starts_as_the_real_score(preset: Path, tmp_path: Path, world: World) -> None:
    """And learns apart from it: no parameter is shared."""
    networks = make_run(preset, "dual_stream", tmp_path / "run", world).stage.networks
    fake = dict(networks["critic"].module.transformer.named_parameters())
    for name, value in networks["real_score"].module.named_parameters():
        assert torch.equal(value, fake[name]) and value.data_ptr() != fake[name].data_ptr()
