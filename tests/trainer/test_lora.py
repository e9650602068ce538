"""LoRA: the adapter computes and learns what the formula says, nothing else moves, and a plain model comes out."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from common.config import load_section
from common.errors import UserError
from common.seeding import seeded_noise
from pipeline.model.config import ModelConfig
from pipeline.model.load_weights import load_transformer
from pipeline.model.transformer import VSRTransformer
from pipeline.vsr_pipeline import open_pipeline
from tests.trainer import scenarios, toys
from tests.trainer.parity import LOSSES, NORMS, deviation
from tests.trainer.presets import TRAINER, losses, write_preset
from tests.trainer.ranks import run_on_ranks
from tests.trainer.reference import PlainDualStream
from tests.trainer.stages import make_run
from tests.trainer.test_throughput import counted_in_earnest
from trainer.config import TrainerConfig
from trainer.engine.config import DeepSpeedConfig, LoRAConfig, OptimizerConfig
from trainer.engine.lora import add_adapter, merged_state, restore_adapter, save_adapter
from trainer.engine.network import Network
from trainer.engine.process_group import World
from trainer.loop import train_loop
from trainer.planning.dry_run import describe
from trainer.planning.flops import flops_per_sample
from trainer.run import parse_arguments, training_job
from trainer.stages import STAGES
from trainer.train import initial_transformer, train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ADAPTER = LoRAConfig(rank=3, alpha=6)
SCALE = 6 / 3
BOTH: dict[str, Any] = {"student": {"rank": 3, "alpha": 6}, "critic": {"rank": 2}}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset"))


def adapted(seed: int = 5, layers: int = 2) -> VSRTransformer:
    """A toy whose adapter and whole modules have moved, as after some training."""
    model = toys.transformer(seed, layers)
    add_adapter(model, ADAPTER, network="student", seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * seeded_noise(parameter.shape, name)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def by_hand(base: VSRTransformer, learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + (alpha/rank)·B·A for every pair of thin matrices, and the fully trainable modules, as they are."""
    weights = {name: value.double() for name, value in base.state_dict().items()}
    for name, value in learned.items():
        if ".lora_A." in name:
            thin = learned[name.replace(".lora_A.", ".lora_B.")].double()
            target = name.split(".lora_A.")[0] + ".weight"
            weights[target] = weights[target] + SCALE * thin @ value.double()
        elif ".lora_B." not in name:
            weights[name] = value.double()
    return weights


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    batch = toys.batch(["a", "b"])
    times = torch.tensor([0.3, 0.7])
    values = (batch.tensors["z_hr"], times, batch.tensors["z_lr"], toys.embed(["a", "b"]))
    return tuple(value.to(dtype) for value in values)


def test_the_adapter_starts_as_no_change_and_the_same_everywhere() -> None:
    first, second, other = (toys.transformer(5, 2) for _ in range(3))
    expected = first(*inputs()).velocity
    state = torch.get_rng_state()
    add_adapter(first, ADAPTER, network="student", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)  # another rank's generator may stand elsewhere
    add_adapter(second, ADAPTER, network="student", seed=1)
    add_adapter(other, ADAPTER, network="critic", seed=1)
    assert torch.equal(first(*inputs()).velocity, expected)
    names = trained(first).keys()
    assert len(names) == 4 + 2 * 10 * 2, "two whole modules, and two matrices beside ten layers in each of two blocks"
    assert all(torch.equal(trained(first)[name], trained(second)[name]) for name in names)
    assert not torch.equal(*(trained(m)["blocks.0.attn1.to_q.lora_A.default.weight"] for m in (first, other)))


def test_forward_and_gradients_are_the_formulas() -> None:
    """Against the plain transformer in float64 with W + s·B·A written out, of which autograd takes the gradient."""
    model = adapted()
    learned = {name: value.double().requires_grad_() for name, value in trained(model).items()}
    plain = toys.transformer(5, 2).double()
    out = functional_call(plain, by_hand(plain, learned), inputs(torch.float64)).velocity
    target = seeded_noise(out.shape, "target").double()
    expected = torch.autograd.grad(((out - target) ** 2).mean(), list(learned.values()))

    model.double()
    found = model(*inputs(torch.float64)).velocity
    # the DiT takes its norms in float32, so a digit may be rounded the other way
    torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-6)
    ((found - target) ** 2).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for (name, gradient), reference in zip(gradients.items(), expected, strict=True):
        assert gradient is not None and reference.norm() > 0, name
        assert (gradient - reference).norm() / reference.norm() < 1e-4, name


ROUNDS = 2  # the thin matrices on the input side have a gradient from the second update on
#: rows of tests/trainer/scenarios.py's `parity`, by number of ranks
ROWS: dict[int, list[dict[str, Any]]] = {
    1: [
        {"engine": {"zero_stage": 2, "gradient_accumulation": 2}},
        {"engine": {"zero_stage": 3, "activation_checkpointing": True}},
    ],
    2: [
        # the threshold keeps adapters whole, while the large weights are sharded
        {"engine": {"zero_stage": 3, "persistence_threshold": 100_000}},
        {"engine": {"zero_stage": 1}, "sequence_parallel": 2},
    ],
}


def plain_logs() -> list[dict[str, float]]:
    """Algorithm 1 with one autograd graph; adapters, whole modules and heads learn."""
    adapters = {name: LoRAConfig(**values) for name, values in BOTH.items()}
    stage = toys.dual_stream(toys.configuration(), lora=adapters)
    modules = (stage.student.module, stage.critic.module, stage.real_score.module)
    plain = PlainDualStream(stage.config, *modules, seed=7)
    for module, network in ((plain.student, stage.student), (plain.critic, stage.critic)):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in network.trained)
    return [plain.round(step, toys.local_batches(toys.global_batches(step, 4, 4), 0, 1, 1)) for step in range(ROUNDS)]


@pytest.mark.distributed
def test_stage_two_is_the_same_however_it_is_sharded(world: World) -> None:
    yardstick = plain_logs()
    rows = {ranks: [row | {"lora": BOTH} for row in chosen] for ranks, chosen in ROWS.items()}
    alone = scenarios.parity(world, rows=rows[1], count=ROUNDS)["rows"]
    together = run_on_ranks("tests.trainer.scenarios:parity", 2, rows=rows[2], count=ROUNDS)[0]["rows"]
    for row, result in zip([*ROWS[1], *ROWS[2]], [*alone, *together], strict=True):
        assert deviation(result["logs"], yardstick, LOSSES) < 1e-4, row
        assert deviation(result["logs"], yardstick, NORMS) < 1e-3, row
        assert result["moved"] == 0
        whole, thin = (2 * 2, 3 * 10 * 2)  # weights and biases of two modules; thin matrices of 3 x 10 layers
        assert len(result["student"]) == whole + thin
        assert result["constants"]["student"] == len(list(toys.transformer(2).parameters())) - whole


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16_weights_stay_while_float32_masters_of_the_adapter_learn(world: World, zero_stage: int) -> None:
    module = adapted()
    learned, kept = trained(module), frozen(module)
    # With so small a rate no bf16 weight can move, but the masters do.
    optimizer = OptimizerConfig(learning_rate=1e-7, weight_decay=0.0)
    network = Network("student", module, deepspeed=DeepSpeedConfig(zero_stage=zero_stage), optimizer=optimizer)
    for _ in range(2):
        with network.updating():
            network.backward(network(*inputs()).velocity.float().square().mean())
            assert network.step() > 0
    masters = network.full_state_dict()
    assert masters.keys() == learned.keys() == network.trained
    assert all(not torch.equal(masters[name], learned[name]) for name in learned)
    assert sum(fragment.numel for fragment in network.fragments) == network.trained_parameter_count
    for value, expected in zip(scenarios.constants(network), kept.values(), strict=True):
        assert torch.equal(value, expected.bfloat16())


def test_a_frozen_call_hears_the_adapter_and_leads_gradients_to_its_inputs(world: World) -> None:
    module = adapted()
    plain = toys.transformer(5, 2)
    plain.load_state_dict({name: value.float() for name, value in by_hand(plain, trained(module)).items()})
    settings = DeepSpeedConfig(zero_stage=3, precision="fp32", persistence_threshold=0)
    network = Network("student", module, deepspeed=settings, optimizer=OptimizerConfig(learning_rate=1e-3))
    found, expected = [], []
    for call, gradients in ((network.frozen, found), (plain.requires_grad_(False), expected)):
        z_t, *others = inputs()
        out = call(z_t.requires_grad_(), *others).velocity
        gradients += [out.detach(), *torch.autograd.grad(out.square().mean(), z_t)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "zero_stage"), [("base", 3), ("progressive", 1), ("dual_stream", 1), ("preference", 1)]
)
def test_every_stage_goes_on_exactly(stage: str, zero_stage: int, preset: Path, tmp_path: Path, world: World) -> None:
    engine = TRAINER["engine"] | {"zero_stage": zero_stage, "persistence_threshold": 100_000}
    changes: dict[str, Any] = {"lora": BOTH, "engine": engine}
    whole = make_run(preset, stage, tmp_path / "whole", world, **changes)
    assert train_loop(whole)
    assert not train_loop(make_run(preset, stage, tmp_path / "cut", world, stop_after=3, **changes))
    last = make_run(preset, stage, tmp_path / "cut", world, **changes)
    assert train_loop(last)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, network in whole.stage.networks.items():
        found, expected = last.stage.networks[name].full_state_dict(), network.full_state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    student = whole.stage.networks["student"]
    files = list((tmp_path / "whole" / "checkpoints").glob("*/student/rank-*.safetensors"))
    kinds = {name.split("/", 2)[2] for file in files for name in load_file(file)}
    assert kinds == student.trained and any(".lora_A." in name for name in kinds)
    if stage == "progressive":  # the teacher is always the latest student
        teacher = whole.stage.networks["teacher"]
        assert teacher.trained == student.trained
        assert teacher.full_state_dict().keys() == student.full_state_dict().keys()
    if stage == "preference":
        assert not hasattr(whole.stage.networks["reference"].module, "peft_config"), "a plain copy is cheaper"


def test_another_adapter_or_base_cannot_go_on(preset: Path, tmp_path: Path, world: World) -> None:
    train_loop(make_run(preset, "base", tmp_path / "run", world, stop_after=1, lora=BOTH))
    smaller = {"student": {"rank": 2, "alpha": 6}}  # every thinner matrix would fit into the saved ones
    with pytest.raises(UserError, match=r"trained parameters, student has .*trainer\.lora as they were"):
        train_loop(make_run(preset, "base", tmp_path / "run", world, lora=smaller))
    with pytest.raises(UserError, match="was trained beside other frozen weights of student: give the same --init"):
        train_loop(make_run(preset, "base", tmp_path / "run", world, lora=BOTH, seed=4))


def test_the_merged_model_is_the_adapted_one(tmp_path: Path) -> None:
    model = adapted()
    base = toys.transformer(5, 2)
    restored = restore_adapter(copy.deepcopy(base), ADAPTER, trained(model), "runs/base/model")
    save_adapter(tmp_path / "adapter", restored)
    merged = copy.deepcopy(base)
    merged.load_state_dict(merged_state(restored), strict=True)
    expected = model(*inputs()).velocity
    assert (expected - base(*inputs()).velocity).abs().max() > 0.1, "the adapter matters"
    torch.testing.assert_close(merged(*inputs()).velocity, expected, rtol=1e-5, atol=2e-6)
    for name, value in by_hand(base, trained(model)).items():
        torch.testing.assert_close(merged.state_dict()[name].double(), value, rtol=1e-6, atol=1e-6)

    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (3, 6, "runs/base/model")
    alone = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(alone(*inputs()).velocity, expected)

    incomplete = dict(itertools.islice(trained(model).items(), 5))
    with pytest.raises(ValueError, match="not this adapter's weights"):
        restore_adapter(copy.deepcopy(base), ADAPTER, incomplete)


def velocity(network: nn.Module) -> Tensor:
    shape = network.config.latent_channels, 2, 4, 4
    z = torch.stack([seeded_noise(shape, "z", i) for i in range(2)])
    prompt = torch.stack([seeded_noise((4, network.config.text_dim), i) for i in range(2)])
    with torch.no_grad():
        return network(z, torch.tensor([0.4, 1.0]), z.flip(0), prompt).velocity


def test_from_stage_to_stage(preset: Path, tmp_path: Path, world: World) -> None:
    """The command's own way: every exported model is plain, and is its base and its adapter."""
    document = yaml.safe_load(preset.read_text())
    document["trainer"] |= {"lora": BOTH}
    document["trainer"]["schedules"] = {
        name: {"global_batch_size": 4, "validate_every": 0, "steps": 2} for name in ("base", "dual_stream")
    } | {"progressive": {"global_batch_size": 4, "validate_every": 0}}
    config = preset.with_name("lora.yaml")
    config.write_text(yaml.safe_dump(document))
    model, trainer = (load_section(config, "model", ModelConfig), load_section(config, "trainer", TrainerConfig))
    base = initial_transformer(None, model, trainer.seed)
    roles: dict[str, list[str]] = {
        "base": [],
        "progressive": ["--init", f"{tmp_path}/base/model"],
        "dual_stream": ["--init", f"{tmp_path}/progressive/model", "--teacher", f"{tmp_path}/progressive/teacher"],
    }
    for stage, more in roles.items():
        output = tmp_path / stage
        line = ["--config", str(config), "--stage", stage, "--data", str(preset.parent / "clips")]
        assert train(training_job(parse_arguments([*line, "--output", str(output), *more])))
        exported = open_pipeline(output / "model").transformer
        assert exported.state_dict().keys() == base.state_dict().keys()
        rebuilt = PeftModel.from_pretrained(copy.deepcopy(base), output / "adapter")
        torch.testing.assert_close(velocity(exported), velocity(rebuilt.base_model.model), rtol=1e-5, atol=2e-6)
        assert not torch.equal(velocity(exported), velocity(base))
        if stage == "progressive":
            teacher = load_transformer(output / "teacher", model.transformer)
            assert not torch.equal(velocity(teacher), velocity(base)), "it has learned guidance"
        base = exported


def test_operations_are_those_of_the_real_step(preset: Path, tmp_path: Path, world: World) -> None:
    engine = TRAINER["engine"] | {"activation_checkpointing": False}
    run = make_run(preset, "dual_stream", tmp_path / "run", world, lora=BOTH, engine=engine)
    iterator = iter(run.reader)
    batches = [next(iterator) for _ in range(run.stage.batches_per_step)]
    found = flops_per_sample(run.stage, 0, batches[0])
    assert found * len(batches[0].keys) == counted_in_earnest(run, 0, batches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": ["to_w"]},
            r"lora\.student\.target_modules: 'to_w': no module's name ends like that; .*to_q",
        ),
        ({"target_modules": ["attn1"]}, r"'attn1': blocks\.0\.attn1 is not a linear layer"),
        ({"trained_modules": ["head"]}, r"trained_modules: 'head' names no module with weights; .*patch_embedding"),
        (
            {"trained_modules": ["blocks.1.ffn"]},
            r"'blocks\.1\.ffn' is fully trainable, but blocks\.1\.ffn\.net\.0\.proj",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_adapter(toys.transformer(5, 2), LoRAConfig(**changes), network="student", seed=1)


def test_only_student_and_critic_have_one() -> None:
    path = CONFIGS / "wan-1.3b-lora.yaml"
    with pytest.raises(UserError, match=r"trainer\.lora = .*'teacher' follows the student's; name one of"):
        load_section(path, "trainer", TrainerConfig, ["trainer.lora.teacher.rank=4"])


def test_a_fake_score_that_is_not_there_has_none() -> None:
    path = CONFIGS / "wan-1.3b-lora.yaml"
    changes = ["trainer.dual_stream.dmd_weight=0", "trainer.dual_stream.tapped=real"]
    with pytest.raises(UserError, match="the critic has no transformer; leave out 'critic'"):
        load_section(path, "trainer", TrainerConfig, changes)


def test_the_dry_run_tells_what_learns_and_what_it_saves() -> None:
    path = CONFIGS / "wan-1.3b-lora.yaml"
    model, trainer = load_section(path, "model", ModelConfig), load_section(path, "trainer", TrainerConfig)
    whole = trainer.model_copy(update={"lora": {}})
    adapter, plain = (describe(STAGES["dual_stream"], model, config, gpus=4) for config in (trainer, whole))
    d, f, rank, depth = 1536, 8960, 64, 30
    thin = depth * rank * (8 * 2 * d + 2 * (d + f))
    patch, projection = (32 * 4 + 1) * d, (d + 1) * 64
    assert f", of which {(thin + patch + projection) / 1e6:.2f} M trainable" in adapter
    assert " learn\n" not in plain

    def optimizer_gib(text: str, network: str) -> float:
        rows = text.split("# memory of each")[1].splitlines()
        return float(next(row for row in rows if row.startswith(network)).split()[3])

    assert optimizer_gib(adapter, "student") == pytest.approx((thin + patch + projection) * 12 / 4 / 2**30, abs=0.01)
    assert optimizer_gib(adapter, "student") < 0.1 * optimizer_gib(plain, "student")
