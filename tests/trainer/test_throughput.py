"""A step's operations are those that FlopCounterMode sees when the step really runs, and rates follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.config import load_section
from pipeline.model.config import ModelConfig
from tests.trainer.presets import LATENT, TRAINER, write_preset
from tests.trainer.stages import make_run
from trainer.engine.process_group import World
from trainer.loop import Run, train_loop
from trainer.monitoring.throughput import Throughput, peak_flops
from trainer.planning.flops import UntrackedModules, flops_per_sample
from trainer.planning.memory import GIB
from trainer.planning.plan import plan_stage
from trainer.stages import STAGES
from trainer.stages.stage import Meter


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset"))


def counted_in_earnest(run: Run, step: int, batches: list[Any]) -> float:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = UntrackedModules()  # type: ignore[assignment]
    with counter, sdpa_kernel(SDPBackend.MATH):  # the fused kernels' backward computes the scores twice
        run.stage.updates(step, batches, Meter("cpu"))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("stage", "step", "changes"),
    [
        ("base", 0, {}),
        ("progressive", 0, {}),
        ("progressive", 3, {}),
        ("preference", 0, {}),
        ("fast_decoder", 2, {}),
        ("dual_stream", 0, {}),
        ("dual_stream", 0, {"dmd_weight": 0.0, "tapped": "real"}),
        ("dual_stream", 0, {"discriminator_input": "clean", "tapped": "fake"}),
        ("dual_stream", 0, {"real_score_guidance": 2.0, "gan_weight": 0.0, "feature_matching_weight": 0.0}),
        ("dual_stream", 0, {"heads_warmup_steps": 1}),
        ("dual_stream", 1, {"heads_warmup_steps": 1}),
    ],
    ids=str,
)
def test_operations_are_those_of_the_real_step(
    stage: str, step: int, changes: dict[str, Any], preset: Path, tmp_path: Path, world: World
) -> None:
    engine = TRAINER["engine"] | {"gradient_accumulation": 2, "activation_checkpointing": False}
    sections = {stage: TRAINER[stage] | changes, "engine": engine}
    run = make_run(preset, stage, tmp_path / "run", world, **sections)
    iterator = iter(run.reader)
    batches = [next(iterator) for _ in range(run.stage.batches_per_step)]
    state = torch.get_rng_state()
    found = flops_per_sample(run.stage, step, batches[0])
    assert torch.equal(torch.get_rng_state(), state)
    samples = len(batches[0].keys) * engine["gradient_accumulation"]
    assert found * samples == counted_in_earnest(run, step, batches)


def test_recomputed_activations_are_not_counted(preset: Path, tmp_path: Path, world: World) -> None:
    counts = []
    for checkpointing in (False, True):
        engine = TRAINER["engine"] | {"zero_stage": 3, "activation_checkpointing": checkpointing}
        run = make_run(preset, "base", tmp_path / "run", world, engine=engine)
        counts.append(flops_per_sample(run.stage, 0, next(iter(run.reader))))
    assert counts[0] == counts[1] > 0


def test_rates_of_a_known_second(preset: Path, tmp_path: Path, world: World) -> None:
    run = make_run(preset, "dual_stream", tmp_path / "run", world)
    batch = next(iter(run.reader))
    flops = flops_per_sample(run.stage, 0, batch)
    throughput = Throughput(run.stage, global_batch_size=16, devices=4, peak=1e9)
    rates = throughput.rates(0, batch, seconds=2.0)
    _, t, h, w = LATENT
    assert rates == {
        "samples_per_second": 8.0,
        "tokens_per_second": 8.0 * t * (h // 2) * (w // 2),
        "tflops_per_device": pytest.approx(flops * 16 / 4 / 2 / 1e12),
        "mfu": pytest.approx(flops * 16 / 4 / 2 / 1e9),
    }


def test_a_run_logs_its_rates(preset: Path, tmp_path: Path, world: World) -> None:
    train_loop(make_run(preset, "progressive", tmp_path / "run", world, stop_after=2))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["samples_per_second"] == pytest.approx(4 / row["seconds_per_step"])
        assert row["tflops_per_device"] > 0 and "mfu" not in row, "nobody knows the peak of this CPU"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize("stage", ["progressive", "dual_stream"])
def test_the_plan_is_what_the_run_does_and_keeps(stage: str, preset: Path, tmp_path: Path, world: World) -> None:
    """Operations of all its steps, and the bytes of its checkpoints; Stage I's phases need different ones."""
    run = make_run(preset, stage, tmp_path, world)
    model = load_section(preset, "model", ModelConfig)
    planned = plan_stage(STAGES[stage], model, run.config, LATENT[1:], 1, rate=1e9)
    assert planned.steps == run.steps and planned.batch == 4
    batch = next(iter(run.reader))
    operations = sum(flops_per_sample(run.stage, step, batch) for step in range(run.steps)) * planned.batch
    assert planned.petaflop * planned.steps * 1e15 == pytest.approx(operations)
    assert planned.hours == pytest.approx(operations / 1e9 / 3600)
    assert train_loop(run)
    written = sorted((tmp_path / "checkpoints").glob("step-*"))[-1].rglob("*.safetensors")
    checkpoint = sum(tensor.nbytes for file in written for tensor in load_file(file).values())  # toys have long headers
    parameters = sum(parameter.numel() for parameter in run.stage.exported.module.parameters())
    models = 4 * parameters * (2 if stage == "progressive" else 1)
    assert planned.storage_gib * GIB == pytest.approx(checkpoint * (run.config.keep_checkpoints + 1) + models, rel=0.02)
