"""A network's engine: learning rates, precision, accumulation, weights that come out and go in exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from tests.trainer import scenarios, toys
from tests.trainer.ranks import run_on_ranks
from trainer.engine.config import DeepSpeedConfig, OptimizerConfig
from trainer.engine.network import Network
from trainer.engine.process_group import World


def _update(network: Network, step: int = 0) -> float:
    batch = toys.batch([f"{step}-a", f"{step}-b"])
    z_hr, z_lr = batch.tensors["z_hr"], batch.tensors["z_lr"]
    with network.updating():
        for _ in range(network.config.gradient_accumulation):
            out = network(z_hr, torch.tensor([0.3, 0.7]), z_lr, toys.embed(["a", "b"]))
            network.backward(out.velocity.float().square().mean())
        return network.step()


def _network(engine: dict[str, Any] | None = None, **settings: Any) -> Network:
    optimizer = settings.pop("optimizer", OptimizerConfig(learning_rate=1e-3))
    config = DeepSpeedConfig(**({"zero_stage": 1, "precision": "fp32"} | (engine or {})))
    return Network("student", toys.transformer(5, 2), deepspeed=config, optimizer=optimizer, **settings)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_learning_rates_survive_warm_up(world: World, zero_stage: int) -> None:
    """Schedulers have collapsed several groups into the first one's rate."""
    module = toys.transformer(5, 2)
    blocks = list(module.blocks.parameters())
    rest = [p for name, p in module.named_parameters() if not name.startswith("blocks.")]
    network = Network(
        "critic",
        module,
        deepspeed=DeepSpeedConfig(zero_stage=zero_stage, precision="fp32", persistence_threshold=0),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_updates=4, weight_decay=0.0, betas=(0.0, 0.999)),
        parameter_groups=[{"params": blocks}, {"params": rest, "lr": 1e-2}],
    )
    before = network.full_state_dict()
    rates = []
    for step in range(5):
        _update(network, step)
        rates.append(tuple(network.learning_rates))
        if step == 0:
            after = network.full_state_dict()
    expected = [(1e-4 * factor, 1e-2 * factor) for factor in (0.25, 0.5, 0.75, 1.0, 1.0)]
    assert rates == [pytest.approx(pair) for pair in expected]
    # Adam's first step without momentum moves each parameter by its rate, so the rates are really used.
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert max(v for k, v in moved.items() if k.startswith("blocks.")) == pytest.approx(0.25e-4, rel=2e-2)
    assert max(v for k, v in moved.items() if not k.startswith("blocks.")) == pytest.approx(0.25e-2, rel=2e-2)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_keeps_float32_masters_and_rotary_tables(world: World, zero_stage: int) -> None:
    # With so small a rate no bf16 weight can move, but the masters do.
    optimizer = OptimizerConfig(learning_rate=1e-7, weight_decay=0.0)
    network = _network({"zero_stage": zero_stage, "precision": "bf16"}, optimizer=optimizer)
    before = network.full_state_dict()
    for step in range(3):
        _update(network, step)
    after = network.full_state_dict()
    assert all(value.dtype == torch.float32 for value in after.values())
    assert all(not torch.equal(before[name], after[name]) for name in after if "attn2.norm" not in name)
    assert all(parameter.dtype == torch.bfloat16 for parameter in network.module.parameters())
    assert all(b.dtype == torch.float32 for _, b in network.module.named_buffers() if b.is_floating_point())


@pytest.mark.parametrize(
    ("engine", "tolerance"),
    [
        ({"zero_stage": 1, "precision": "fp32", "offload_optimizer": True}, 0.0),
        ({"zero_stage": 2, "precision": "bf16", "offload_optimizer": True}, 0.0),
        ({"zero_stage": 3, "precision": "fp32", "offload_optimizer": True, "offload_parameters": True}, 1e-6),
        ({"zero_stage": 3, "precision": "bf16", "offload_optimizer": True, "offload_parameters": True}, 1e-6),
    ],
    ids=str,
)
def test_offloading_changes_no_number(world: World, engine: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    """Masters and moments on the host; on a CPU that is where they are anyway, but by DeepSpeed's other paths."""
    settings = engine | {"persistence_threshold": 0}
    offloaded = _network(settings, ema_decay=0.9)
    kept = {name: value for name, value in settings.items() if not name.startswith("offload")}
    plain = _network(kept, ema_decay=0.9)
    deepspeed_engine, optimizer = offloaded._engine, offloaded._engine.optimizer
    assert deepspeed_engine.zero_offload_optimizer().device == "cpu"
    assert getattr(optimizer, "offload_optimizer", False) or optimizer.cpu_offload
    assert isinstance(optimizer.optimizer, torch.optim.AdamW), "none of DeepSpeed's own, which would be compiled"
    if engine["zero_stage"] == 3:
        assert deepspeed_engine.zero_offload_param().device == "cpu" and optimizer.offload_param
    norms = [(_update(offloaded, step), _update(plain, step)) for step in range(3)]
    assert all(one == pytest.approx(two, rel=1e-6) for one, two in norms)
    for ema in (False, True):
        one, two = offloaded.full_state_dict(ema=ema), plain.full_state_dict(ema=ema)
        assert all(torch.allclose(one[name], two[name], rtol=0, atol=tolerance) for name in one)
    offloaded.save(tmp_path)
    again = _network(settings, ema_decay=0.9)
    again.load(tmp_path)
    assert _update(again, 3) == _update(offloaded, 3)


def test_accumulation_is_refused_when_miscounted(world: World) -> None:
    network = _network({"gradient_accumulation": 2})
    with network.updating(), pytest.raises(RuntimeError, match="0 of 2 backward"):
        network.step()


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_save_and_load_continue_exactly(world: World, tmp_path: Path, zero_stage: int, precision: str) -> None:
    settings = {"zero_stage": zero_stage, "precision": precision, "persistence_threshold": 0}
    first = _network(settings, ema_decay=0.9)
    for step in range(2):
        _update(first, step)
    first.save(tmp_path)
    norms = [_update(first, step) for step in range(2, 5)]
    second = _network(settings, ema_decay=0.9)
    second.load(tmp_path)
    assert second.updates == 2
    assert [_update(second, step) for step in range(2, 5)] == norms
    for ema in (False, True):
        one, two = first.full_state_dict(ema=ema), second.full_state_dict(ema=ema)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_load_refuses_what_is_not_its_own(world: World, tmp_path: Path) -> None:
    network = _network()
    with pytest.raises(UserError, match="not a checkpoint"):
        network.load(tmp_path)
    network.save(tmp_path)
    with pytest.raises(UserError, match="lacks ema of"):
        _network(ema_decay=0.9).load(tmp_path)
    file = tmp_path / "rank-00000.safetensors"
    (tmp_path / "rank-00001.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="2 of 1 rank files"):
        network.load(tmp_path)


def test_state_dict_fits_the_module_it_came_from(world: World) -> None:
    network = _network({"zero_stage": 3, "persistence_threshold": 0})
    _update(network)
    module = toys.transformer(6, 2)
    assert module.load_state_dict(network.full_state_dict(), strict=True)
    assert network.parameter_count == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.distributed
def test_checkpoint_of_two_ranks_at_zero_3_continues_on_one_at_zero_1(world: World, tmp_path: Path) -> None:
    """And the other way round: fragments know where they belong."""
    for source, target in ((2, 1), (1, 2)):
        folder = tmp_path / f"from-{source}"
        folder.mkdir()
        stages = {1: 1, 2: 3}
        run = {"target": "tests.trainer.scenarios:checkpoint", "folder": str(folder)}
        written = _scenario(world, source, zero_stage=stages[source], save=True, **run)
        read = _scenario(world, target, zero_stage=stages[target], save=False, **run)
        assert written[0]["norms"] == pytest.approx(read[0]["norms"], rel=1e-5)
        for kind in ("student", "ema"):
            for name, value in written[0][kind].items():
                torch.testing.assert_close(read[0][kind][name], value, rtol=1e-4, atol=1e-6)


def _scenario(world: World, ranks: int, target: str, **arguments: Any) -> list[dict[str, Any]]:
    if ranks == 1:
        return [scenarios.checkpoint(world, **arguments)]
    return run_on_ranks(target, ranks, **arguments)
