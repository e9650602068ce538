"""What the trainer's tests run on several ranks (tests/trainer/ranks.py), or on one in pytest's process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from common.seeding import seeded_noise
from pipeline.model.sequence_parallel import form_sequence_groups
from tests.trainer import toys
from tests.trainer.presets import TRAINER
from tests.trainer.stages import make_run
from trainer.engine.config import DeepSpeedConfig, LoRAConfig, OptimizerConfig
from trainer.engine.network import Network
from trainer.engine.process_group import World
from trainer.loop import train_loop

#: the networks that can skip an update
SKIPPED = ("critic", "student")


def rounds(
    world: World,
    *,
    count: int = 5,
    size: int = 4,
    engine: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    sequence_parallel: int = 1,
    lora: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """`count` rounds of Stage II; logs of each, the student's weights and EMA (rank 0) at the end, and how many tensors
    of student and critic never learn and how many of those have moved."""
    settings = DeepSpeedConfig(**({"precision": "fp32", "persistence_threshold": 0} | (engine or {})))
    sequence = form_sequence_groups(sequence_parallel)
    adapters = {name: LoRAConfig(**values) for name, values in (lora or {}).items()}
    stage = toys.dual_stream(toys.configuration(**(config or {})), settings, sequence=sequence, lora=adapters)
    before = {name: constants(stage.networks[name]) for name in ("student", "critic")}
    reader, readers = world.rank // sequence.size, world.size // sequence.size
    logs = []
    for step in range(count):
        keys = toys.global_batches(step, stage.config.auxiliary_updates + 1, size)
        batches = toys.local_batches(keys, reader, readers, settings.gradient_accumulation)
        logs.append(stage.train_step(step, batches))
    now = {name: constants(stage.networks[name]) for name in before}
    return {
        "constants": {name: len(values) for name, values in now.items()},
        "moved": sum(not torch.equal(*pair) for name in now for pair in zip(before[name], now[name], strict=True)),
        "logs": logs,
        "student": stage.student.full_state_dict(),
        "ema": stage.student.full_state_dict(ema=True),
        "critic": stage.critic.full_state_dict(),
    }


def constants(network: Network) -> list[Tensor]:
    """Whole values of the parameters that never learn, of a network that is no frozen one. Collective."""
    parameters = [p for name, p in network.module.named_parameters() if name not in network.trained]
    if network.config.zero_stage == 3:
        assert all(p.numel() == 0 or p.ds_persist for p in parameters), "between the passes they are sharded"
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]


def student_passes(
    world: World, *, zero_stage: int, network: str, call: str, requires_grad: bool, steps: int = 4
) -> dict[str, Any]:
    """Alternate an update of a critic with a pass through it whose gradient is wanted at the input only.

    Args:
        network: `critic` (it is updated between the passes) or `real_score` (it never is).
        call: `engine` or `engine.module`: how the pass calls it.
        requires_grad: of its parameters during the pass.

    Returns:
        errors: per step, the relative errors of the pass's gradient and of the critic's gradient norm,
            against an unsharded copy; error: the exception's name, if one ended it.
    """
    settings = DeepSpeedConfig(zero_stage=zero_stage, precision="fp32", persistence_threshold=0)
    optimizer = OptimizerConfig(learning_rate=1e-3)
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 6))
    plain = copy.deepcopy(module)
    adam = torch.optim.AdamW(plain.parameters(), 1e-3, betas=optimizer.betas, weight_decay=0.01)
    sharded = Network(network, module, deepspeed=settings, optimizer=optimizer if network == "critic" else None)
    engine = sharded._engine
    errors: list[list[float]] = []
    for step in range(steps):
        norms = (0.0, 0.0)
        try:
            if network == "critic":
                data = seeded_noise((4 * world.size, 6), "data", step)
                with sharded.updating():
                    sharded.backward(sharded(data.chunk(world.size)[world.rank]).square().mean())
                    mine = sharded.step()
                adam.zero_grad()
                plain(data).square().mean().backward()
                norms = (mine, nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item())
                adam.step()
            x = seeded_noise((4, 6), "x", step, world.rank)
            target = engine.module if call == "engine.module" else engine
            module.requires_grad_(requires_grad)
            found = _input_gradient(target, x)
            module.requires_grad_(False)
        except (RuntimeError, AssertionError, IndexError, AttributeError, KeyError) as error:
            return {"errors": errors, "error": type(error).__name__}
        errors.append([_relative(found, _input_gradient(plain, x)), abs(norms[0] - norms[1]) / (norms[1] or 1.0)])
    return {"errors": errors, "error": ""}


def _input_gradient(call: Any, x: Tensor) -> Tensor:
    """A loss on the output, its gradient at the input; parameters that ask for one get theirs as well."""
    leaf = x.clone().requires_grad_()
    call(leaf).square().mean().backward()
    assert leaf.grad is not None
    return leaf.grad


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def table_of_calls(world: World, *, rows: list[tuple[int, str, str, bool]]) -> dict[str, Any]:
    names = ("zero_stage", "network", "call", "requires_grad")
    return {"rows": [student_passes(world, **dict(zip(names, row, strict=True))) for row in rows]}


def checkpoint(world: World, *, zero_stage: int, folder: str, save: bool) -> dict[str, Any]:
    """Two updates and a save, or a load; then two more, on global batches that don't depend on the ranks."""
    engine = DeepSpeedConfig(zero_stage=zero_stage, precision="fp32", persistence_threshold=100)
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_updates=3)
    network = Network("student", toys.transformer(5, 2), deepspeed=engine, optimizer=optimizer, ema_decay=0.9)

    def update(step: int) -> float:
        keys = [f"{step}-{index}" for index in range(4)]
        batch = toys.batch(keys[world.rank :: world.size])
        z_hr = batch.tensors["z_hr"]
        with network.updating():
            t = torch.full((len(z_hr),), 0.5)
            out = network(z_hr, t, batch.tensors["z_lr"], toys.embed(["a"] * len(z_hr)))
            network.backward(out.velocity.square().mean())
            return network.step()

    if save:
        for step in range(2):
            update(step)
        network.save(Path(folder))
        torch.distributed.barrier()
    else:
        batch = toys.batch(["before"])
        for _ in range(2):  # in use: what ZeRO-3 keeps whole is so from the second call on, with its old values
            network.frozen(batch.tensors["z_hr"], torch.ones(1), batch.tensors["z_lr"], toys.embed(["a"]))
        network.load(Path(folder))
    norms = [update(step) for step in range(2, 4)]
    return {"norms": norms, "student": network.full_state_dict(), "ema": network.full_state_dict(ema=True)}


def parity(world: World, *, rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """`rounds` for each row of the parity table, one after the other."""
    return {"rows": [rounds(world, count=count, **row) for row in rows]}


def poisoned_run(world: World, *, preset: str, output: str) -> dict[str, Any]:
    """Stage II through the loop at ZeRO-3; the last rank meets a NaN in an auxiliary update, later in the student's."""
    engine = TRAINER["engine"] | {"zero_stage": 3}
    schedules = {"dual_stream": {"steps": 3, "global_batch_size": 4, "validate_every": 0}}
    run = make_run(Path(preset), "dual_stream", Path(output), world, engine=engine, schedules=schedules)
    train_step = run.stage.train_step
    poisoned_update = {0: 1, 1: 2}  # by step; two auxiliary updates, then the student's

    def poisoned(step: int, batches: Any) -> dict[str, float]:
        if step in poisoned_update and world.rank == world.size - 1:
            batches[poisoned_update[step]].tensors["z_hr"][0, 0, 0, 0, 0] = torch.nan
        values = train_step(step, batches)
        networks = [run.stage.networks[name] for name in SKIPPED]
        masters = [fragment.master for network in networks for fragment in network.fragments]
        finite.append(all(bool(torch.isfinite(master).all()) for master in masters))
        skipped.append([network.skipped for network in networks])
        return values

    finite: list[bool] = []
    skipped: list[list[int]] = []
    run.stage.train_step = poisoned  # type: ignore[method-assign]
    return {"finished": train_loop(run), "finite": finite, "skipped": skipped}
