"""The dry run of the paper's preset: no GPU, no weights, numbers that can be checked by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from common.config import load_section
from common.errors import UserError
from pipeline.model.config import ModelConfig
from trainer import run as command
from trainer.config import TrainerConfig
from trainer.engine.config import DeepSpeedConfig
from trainer.planning.dry_run import count_parameters, describe, meta_networks
from trainer.planning.memory import GIB, ActivationSizes, network_memory
from trainer.stages import STAGES
from trainer.stages.dual_stream.activations import activation_bytes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: the stages that train a DiT
STUDENTS = [name for name, spec in STAGES.items() if spec.networks[0].name == "student"]
PRESETS = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("ablations/*.yaml")])


@pytest.mark.parametrize("stage", STUDENTS)
def test_the_papers_preset(stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--config", str(CONFIGS / "wan-1.3b.yaml"), "--stage", stage, "--dry-run", "--gpus", "4"]
    monkeypatch.setattr(sys, "argv", ["run.py", *line])
    command.main()
    printed = capsys.readouterr().out
    resolved, rest = printed.split("# parameters")
    document = yaml.safe_load(resolved)
    assert ModelConfig(**document["model"]).transformer.num_layers == 30
    assert TrainerConfig(**document["trainer"]).dual_stream.auxiliary_updates == 3
    assert "1419." in rest.splitlines()[1], "Wan2.1-1.3B with the widened patch embedding, in millions"
    assert "# memory of each of 4 GPUs" in rest
    engines = rest.split("# DeepSpeed configuration\n")[1]
    student = json.JSONDecoder().raw_decode(engines.removeprefix("student: "))[0]
    assert student["zero_optimization"]["stage"] == 1 and student["bf16"]["enabled"]


def test_heads_count_with_the_critic() -> None:
    path = CONFIGS / "wan-1.3b.yaml"
    model, trainer = load_section(path, "model", ModelConfig), load_section(path, "trainer", TrainerConfig)

    def parameter_counts(config: TrainerConfig) -> dict[str, int]:
        networks = meta_networks(STAGES["dual_stream"], model, config)
        return {name: count_parameters(network) for name, network in networks.items()}

    counts = parameter_counts(trainer)
    assert counts["student"] == counts["real_score"] < counts["critic"]
    no_gan = trainer.dual_stream.model_copy(update={"gan_weight": 0.0, "feature_matching_weight": 0.0})
    without = parameter_counts(trainer.model_copy(update={"dual_stream": no_gan}))
    assert without["critic"] == counts["student"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_resolves(path: Path) -> None:
    model, trainer = load_section(path, "model", ModelConfig), load_section(path, "trainer", TrainerConfig)
    for stage in STAGES.values():
        assert "# DeepSpeed configuration" in describe(stage, model, trainer, gpus=4)


@pytest.mark.parametrize(
    ("zero_stage", "gpus", "bytes_per_parameter"),
    [(1, 1, 2 + 4 + 12 + 4), (1, 8, 2 + 4 + (12 + 4) / 8), (2, 8, 2 + (12 + 4) / 8), (3, 8, (2 + 4 + 12 + 4) / 8)],
)
def test_memory_of_a_trained_network(zero_stage: int, gpus: int, bytes_per_parameter: float) -> None:
    config = DeepSpeedConfig(zero_stage=zero_stage)
    memory = network_memory(1_000_000, config, gpus, trained=True, ema=True)
    assert memory.total * GIB == pytest.approx(1_000_000 * bytes_per_parameter)
    frozen = network_memory(1_000_000, config, gpus, trained=False, ema=False)
    assert frozen.total * GIB == pytest.approx(2_000_000 / (gpus if zero_stage == 3 else 1))


def test_offloaded_states_leave_the_gpu() -> None:
    config = DeepSpeedConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    memory = network_memory(1_000_000, config, 1, trained=True, ema=True)
    assert memory.optimizer == memory.ema == memory.weights == 0


def test_checkpointing_saves_activations() -> None:
    model = load_section(CONFIGS / "wan-1.3b.yaml", "model", ModelConfig)
    plain, saving = (
        ActivationSizes.of(model.transformer, engine, (6, 88, 160), 1, 1).update()
        for engine in (DeepSpeedConfig(activation_checkpointing=on) for on in (False, True))
    )
    assert saving < 0.1 * plain


def test_stage_2_holds_more_at_once_than_one_network() -> None:
    model = load_section(CONFIGS / "wan-1.3b.yaml", "model", ModelConfig)
    config = load_section(CONFIGS / "wan-1.3b.yaml", "trainer", TrainerConfig)
    engine = config.engine_of("student")
    sizes = ActivationSizes.of(model.transformer, engine, (6, 88, 160), 1, 1)
    assert activation_bytes(sizes, config.dual_stream) > 1.4 * sizes.update()
    shared = ActivationSizes.of(model.transformer, engine, (6, 88, 160), 1, 4)
    assert shared.update() < 0.3 * sizes.update()


def test_the_codec_has_a_dry_run_of_its_own_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--config", str(CONFIGS / "tiny.yaml"), "--stage", "codec", "--dry-run", "--gpus", "1"]
    monkeypatch.setattr(sys, "argv", ["run.py", *line])
    command.main()
    parameters = capsys.readouterr().out.split("# parameters")[1].splitlines()[1]
    assert parameters.split() == ["codec", "2.12", "M"]


def test_64_gpus_share_the_papers_batches_and_fit_at_zero_1() -> None:
    model = load_section(CONFIGS / "wan-1.3b.yaml", "model", ModelConfig)
    config = load_section(CONFIGS / "wan-1.3b.yaml", "trainer", TrainerConfig)
    stages = [STAGES[name] for name in STUDENTS]
    for ranks in (8, 16, 32, 64):
        assert [config.micro_batch_of(stage, ranks) for stage in stages] == [64 // ranks] * 4
    printed = describe(STAGES["dual_stream"], model, config, gpus=64)
    static = float(next(line for line in printed.splitlines() if line.startswith("static")).split()[1])
    assert static < 30, "GiB of each GPU"
    assert "per node of 8" in printed
    with pytest.raises(UserError, match=r"global_batch_size = 64 is not a multiple of 48 ranks.*set it to 48"):
        describe(STAGES["dual_stream"], model, config, gpus=48)


def test_compiled_blocks_are_refused_at_zero_3() -> None:
    with pytest.raises(UserError, match=r"compile_blocks: true and engine.zero_stage = 3.*set compile_blocks to false"):
        load_section(CONFIGS / "wan-1.3b.yaml", "trainer", TrainerConfig, ["trainer.engine.zero_stage=3"])
