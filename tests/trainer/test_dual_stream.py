"""Stage II: the three-engine step is Algorithm 1, and each of the algorithm's traps is avoided."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from pydantic import ValidationError
from torch import Tensor

from tests.trainer import toys
from tests.trainer.reference import PlainDualStream
from trainer.engine.config import DeepSpeedConfig
from trainer.engine.process_group import World
from trainer.stages.dual_stream.algorithm import DualStream
from trainer.stages.dual_stream.config import DualStreamConfig
from trainer.stages.stage import Meter

VARIANTS: dict[str, dict[str, Any]] = {
    "all terms": {},
    "DMD only": {"gan_weight": 0.0, "feature_matching_weight": 0.0},
    "GAN only": {"dmd_weight": 0.0},
    "L_G alone": {"dmd_weight": 0.0, "feature_matching_weight": 0.0},
    "L_FM alone": {"dmd_weight": 0.0, "gan_weight": 0.0},
    "real features": {"tapped": "real"},
    "fake features": {"tapped": "fake"},
    "no fake score": {"dmd_weight": 0.0, "tapped": "real"},
    "raw features": {"feature_matching": "raw"},
    "terms apart": {"gradient_norms_every": 1},
    "terms apart, fake features": {"gradient_norms_every": 1, "tapped": "fake"},
    "decoupled guidance": {"real_score_guidance": 2.0, "guidance_time_range": (0.6, 0.98)},
    "data forcing": {"data_forcing_weight": 0.5},
}


def _keys(step: int) -> list[list[str]]:
    return toys.global_batches(step, 4, 2)


def _batches(step: int) -> list[Any]:
    return toys.local_batches(_keys(step), 0, 1, 1)


def _plain(stage: DualStream) -> PlainDualStream:
    modules = (stage.student.module, stage.critic.module, stage.real_score.module)
    return PlainDualStream(stage.config, *modules, seed=7)


def _student_gradient(stage: DualStream, batch: Any) -> dict[str, Tensor]:
    """Of every parameter of the student, as its engine has it before the update."""
    gradients: dict[str, Tensor] = {}
    step = stage.student.step

    def read_then_step() -> float:
        for name, parameter in stage.student.module.named_parameters():
            gradients[name] = safe_get_full_grad(parameter).clone()
        return step()

    stage.student.step = read_then_step  # type: ignore[method-assign]
    stage.student_update(0, [batch], Meter("cpu"))
    return gradients


def _plain_gradient(plain: PlainDualStream, batch: Any) -> dict[str, Tensor]:
    plain.student_losses(plain.sample(batch, 0, 3))["loss_student"].backward()
    return {name: p.grad if p.grad is not None else 0 * p for name, p in plain.student.named_parameters()}


def _relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    error = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    return float((error / sum(value.double().square().sum() for value in expected.values())).sqrt())


@pytest.mark.parametrize("name", VARIANTS)
def test_student_gradient_is_that_of_one_graph(world: World, name: str) -> None:
    stage = toys.dual_stream(toys.configuration(**VARIANTS[name]))
    plain, batch = _plain(stage), _batches(0)[-1]
    assert _relative(_student_gradient(stage, batch), _plain_gradient(plain, batch)) <= 1e-5


def test_student_gradient_at_zero_3_with_checkpointing(world: World) -> None:
    stage = toys.dual_stream(toys.configuration())
    plain, batch = _plain(stage), _batches(0)[-1]
    engine = DeepSpeedConfig(zero_stage=3, precision="fp32", persistence_threshold=0, activation_checkpointing=True)
    sharded = toys.dual_stream(toys.configuration(), engine)
    assert _relative(_student_gradient(sharded, batch), _plain_gradient(plain, batch)) <= 1e-5


def test_trap_1_the_gan_gradient_reaches_the_student(world: World) -> None:
    """With D = H(sg[h^S]), as Algorithm 1 prints it, this gradient would be zero."""
    stage = toys.dual_stream(toys.configuration(**VARIANTS["L_G alone"]))
    gradient = _student_gradient(stage, _batches(0)[-1])
    assert sum(value.abs().sum() for value in gradient.values()) > 1e-3


@pytest.mark.parametrize("tapped", ["real", "fake"])
def test_trap_1_holds_for_each_backbone(world: World, tapped: str) -> None:
    stage = toys.dual_stream(toys.configuration(**VARIANTS["L_FM alone"], tapped=tapped))
    gradient = _student_gradient(stage, _batches(0)[-1])
    assert sum(value.abs().sum() for value in gradient.values()) > 1e-3


def test_trap_2_the_generator_sits_at_1_and_the_score_models_at_t(world: World) -> None:
    stage = toys.dual_stream(toys.configuration())
    times = _record_times(stage)
    stage.train_step(0, _batches(0))
    assert len(times["student"]) == 4 and all((t == 1).all() for t in times["student"])
    for name in ("real_score", "critic"):
        assert times[name] and all((t <= 0.98).all() and (t >= 0.02).all() for t in times[name])


def _record_times(stage: DualStream) -> dict[str, list[Tensor]]:
    times: dict[str, list[Tensor]] = {"student": [], "critic": [], "real_score": []}
    for name, network in stage.networks.items():
        network.module.register_forward_pre_hook(
            lambda _, inputs, name=name: times[name].append(inputs[1].detach().clone())
        )
    return times


def test_critic_does_not_move_in_the_student_update_nor_the_student_in_the_critics(world: World) -> None:
    stage = toys.dual_stream(toys.configuration())
    for update, moves in (("auxiliary", "critic"), ("student", "student")):
        before = {name: _weights(network) for name, network in stage.networks.items()}
        if update == "auxiliary":
            stage.auxiliary_update(0, 0, _batches(0)[:1], Meter("cpu"))
        else:
            stage.student_update(0, _batches(0)[-1:], Meter("cpu"))
        for name, network in stage.networks.items():
            moved = any(not torch.equal(a, b) for a, b in zip(before[name], _weights(network), strict=True))
            assert moved == (name == moves), (update, name)


def _weights(network: Any) -> list[Tensor]:
    weights = [parameter.detach().clone() for parameter in network.module.parameters()]
    return weights + [fragment.master.clone() for fragment in network.fragments]


def _critic_gradient(stage: DualStream, batch: Any, prefix: str = "") -> dict[str, Tensor]:
    """Of every parameter of the critic under `prefix`, as its engine has it before the update."""
    gradients: dict[str, Tensor] = {}
    step = stage.critic.step

    def read_then_step() -> float:
        for name, parameter in stage.critic.module.named_parameters():
            if name.startswith(prefix):
                gradients[name] = safe_get_full_grad(parameter).clone()
        return step()

    stage.critic.step = read_then_step  # type: ignore[method-assign]
    stage.auxiliary_update(0, 0, [batch], Meter("cpu"))
    return gradients


def test_each_group_learns_from_its_own_loss(world: World) -> None:
    """L_Diff's gradient on θ_F is the same with and without the discriminator beside it."""
    batch = _batches(0)[0]
    stages = [toys.dual_stream(toys.configuration(**changes)) for changes in ({}, VARIANTS["DMD only"])]
    with_heads, alone = (_critic_gradient(stage, batch, "transformer.") for stage in stages)
    assert _relative(with_heads, alone) <= 1e-6


@pytest.mark.parametrize(
    "changes",
    [{}, {"r1_weight": 10.0}, {"r2_weight": 10.0, "tapped": "fake"}, {"r1_weight": 5.0, "r2_weight": 10.0}],
    ids=str,
)
def test_critic_gradient_is_that_of_one_graph(world: World, changes: dict[str, Any]) -> None:
    stage = toys.dual_stream(toys.configuration(perturbation_sigma=0.3, **changes))
    plain, batch = _plain(stage), _batches(0)[0]
    torch.stack(list(plain.auxiliary_losses(plain.sample(batch, 0, 0)).values())).sum().backward()
    expected = {name: p.grad if p.grad is not None else 0 * p for name, p in plain.critic.named_parameters()}
    assert _relative(_critic_gradient(stage, batch), expected) <= 1e-5


def test_norms_of_the_terms_at_z0_are_logged_in_their_steps(world: World) -> None:
    stage = toys.dual_stream(toys.configuration(gradient_norms_every=2))
    logs = [stage.train_step(step, _batches(step)) for step in range(2)]
    assert not [name for name in logs[0] if name.startswith("z0_gradient_norm")]
    plain = _plain(toys.dual_stream(toys.configuration()))
    batch, config = _batches(0)[-1], plain.config
    s = plain.sample(batch, 1, 3)
    apart, meter = toys.dual_stream(toys.configuration(gradient_norms_every=2)), Meter("cpu")
    apart.student_gradient(1, plain.one_step(s).detach().requires_grad_(), apart._sample(batch, 1, 3), meter)
    z0 = plain.one_step(s).detach().requires_grad_()
    plain.one_step = lambda _: z0  # type: ignore[method-assign]
    losses = plain.student_losses(s)
    for name, loss, weight in (
        ("dmd", losses["loss_dmd"], config.dmd_weight),
        ("gan", losses["loss_generator"], config.gan_weight),
        ("feature_matching", losses["loss_feature_matching"], config.feature_matching_weight),
    ):
        norm = weight * torch.autograd.grad(loss, z0, retain_graph=True)[0].norm()
        assert meter.means()[f"z0_gradient_norm_{name}"] == pytest.approx(norm.item(), rel=1e-4), name


@pytest.mark.parametrize(
    "engine",
    [
        {"zero_stage": 1},
        {"zero_stage": 2, "gradient_accumulation": 2},
        {"zero_stage": 3, "gradient_accumulation": 2},
        {"zero_stage": 3, "offload_optimizer": True},
    ],
    ids=str,
)
def test_fake_score_and_heads_have_norms_of_their_own(world: World, engine: dict[str, Any]) -> None:
    settings = DeepSpeedConfig(**({"precision": "fp32", "persistence_threshold": 0} | engine))
    stage = toys.dual_stream(toys.configuration(gan_weight=0.0), settings)
    plain, meter = _plain(toys.dual_stream(toys.configuration(gan_weight=0.0))), Meter("cpu")
    micro_batches = toys.local_batches(toys.global_batches(0, 1, 2), 0, 1, settings.gradient_accumulation)
    stage.auxiliary_update(0, 0, micro_batches, meter)
    sum(plain.auxiliary_losses(plain.sample(_batches(0)[0], 0, 0)).values()).backward()  # type: ignore[union-attr]
    for name, module in (("fake_score", plain.fake), ("heads", plain.critic.heads)):
        norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
        assert meter.means()[f"gradient_norm_{name}"] == pytest.approx(norm.item(), rel=1e-4), name


def test_no_fake_score_where_nothing_looks_at_it(world: World) -> None:
    stage = toys.dual_stream(toys.configuration(**VARIANTS["no fake score"]))
    names = {name for name, _ in stage.critic.module.named_parameters()}
    assert names and all(name.startswith("heads.") for name in names)
    log = stage.train_step(0, _batches(0))
    assert "loss_diffusion" not in log and log["loss_discriminator"] > 0 and log["gradient_norm_critic"] > 0
    assert set(stage.previews(_batches(0)[0])) == {"student", "real_score"} == set(stage.preview_names)


def test_forward_passes_are_no_more_than_the_algorithm_needs(world: World) -> None:
    """Auxiliary: θ_S once, θ_R once (S and HR batched), θ_F twice. Student update: θ_R and θ_F twice."""
    stage = toys.dual_stream(toys.configuration(), layers=5)
    passes: Counter[str] = Counter()
    models = {"student": stage.student, "real": stage.real_score, "fake": stage.critic}
    for name, network in models.items():
        blocks = getattr(network.module, "transformer", network.module).blocks
        for depth, block in enumerate(blocks, start=1):
            block.register_forward_hook(lambda *_, key=f"{name} {depth}": passes.update([key]))
    # 30 %, 60 %, 90 % of 5 layers: taps 2, 3, 4, so block 5 only runs where a velocity is wanted.
    stage.train_step(0, _batches(0))
    assert [passes[f"student {depth}"] for depth in (1, 5)] == [4, 4]
    assert [passes[f"real {depth}"] for depth in (1, 4, 5)] == [3 + 2, 3 + 2, 1]
    assert [passes[f"fake {depth}"] for depth in (1, 4, 5)] == [3 * 2 + 2, 3 * 2 + 2, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"gan_loss": "softplus"},
        {"gan_loss": "relativistic", "r1_weight": 1.0, "r2_weight": 1.0},
        {"r1_weight": 1.0, "discriminator_input": "clean"},
        {"discriminator_input": "clean"},
        {"discriminator_input": "clean", "tapped": "fake"},
        {"shared_noise": False},
        {"real_score_guidance": 3.0},
        {"heads_warmup_steps": 1},
        {"schedule": "sequential", "sequential_dmd_steps": 1},
    ],
    ids=str,
)
def test_switches_train(world: World, changes: dict[str, Any]) -> None:
    stage = toys.dual_stream(toys.configuration(**changes))
    logs = [stage.train_step(step, _batches(step)) for step in range(2)]
    assert all(value == value and abs(value) < 1e3 for log in logs for value in log.values()), logs
    assert all(log["gradient_norm_student"] > 0 and log["gradient_norm_critic"] > 0 for log in logs)


def test_schedules_decide_the_terms_of_the_students_loss(world: World) -> None:
    joint = toys.dual_stream(DualStreamConfig(heads_warmup_steps=2))
    assert [joint.weights(step) for step in (0, 1, 2)] == [(1.0, 0.0, 0.0)] * 2 + [(1.0, 0.1, 0.05)]
    forced = toys.dual_stream(DualStreamConfig(data_forcing_weight=1.0, data_forcing_from_step=3))
    assert [forced.objective(step) for step in (2, 3)] == ["DMD + GAN + FM", "DMD + GAN + FM + DF"]
    sequential = toys.dual_stream(DualStreamConfig(schedule="sequential", sequential_dmd_steps=5))
    assert [sequential.weights(step) for step in (4, 5)] == [(1.0, 0.0, 0.0), (0.0, 0.1, 0.05)]


def test_without_dmd_the_student_waits_for_the_heads(world: World) -> None:
    stage = toys.dual_stream(toys.configuration(dmd_weight=0.0, heads_warmup_steps=1))
    before = [fragment.master.clone() for fragment in stage.student.fragments]
    first = stage.train_step(0, _batches(0))
    assert all(torch.equal(f.master, value) for f, value in zip(stage.student.fragments, before, strict=True))
    assert first["gradient_norm_critic"] > 0 and "gradient_norm_student" not in first
    assert stage.objective(0) == "heads alone" and stage.objective(1) == "GAN + FM"
    second = stage.train_step(1, _batches(1))
    assert second["gradient_norm_student"] > 0 and stage.student.updates == 1


def test_guided_real_score_uses_one_plus_w(world: World) -> None:
    """v_cfg = (1 + w)·v(c) − w·v(∅)."""
    stage = toys.dual_stream(toys.configuration(real_score_guidance=3.0))
    s = stage._sample(_batches(0)[0], 0, 0)
    v, _ = stage._real_forward(s.z_hr, None, s, dmd=True, gan=False)
    real = stage.real_score.module
    conditional = real(s.z_hr, s.t, s.z_lr, s.prompt).velocity
    null = real(s.z_hr, s.t, s.z_lr, toys.embed(["", ""])).velocity
    torch.testing.assert_close(v, 4 * conditional - 3 * null)


def test_previews_show_all_three_networks_and_repeat(world: World) -> None:
    stage = toys.dual_stream(toys.configuration())
    first, again = stage.previews(_batches(0)[0]), stage.previews(_batches(0)[0])
    assert set(first) == {"student", "real_score", "fake_score"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(value.shape == (2, *toys.LATENT) and value.dtype == torch.float32 for value in first.values())


def test_draws_belong_to_the_sample(world: World) -> None:
    """The same sample meets the same noise whatever batch it is in, and another one in another update."""
    stage = toys.dual_stream(toys.configuration())
    together, alone = toys.batch(["a", "b"]), toys.batch(["b"])
    one, two = stage._sample(together, 0, 0), stage._sample(alone, 0, 0)
    for field in ("t", "noise", "noise_s"):
        assert torch.equal(getattr(one, field)[1:], getattr(two, field)), field
    assert not torch.equal(one.noise, one.noise_s)
    assert not torch.equal(two.noise, stage._sample(alone, 0, 1).noise)


def test_a_loss_that_is_not_finite_changes_nothing(world: World) -> None:
    stage = toys.dual_stream(toys.configuration())
    stage.train_step(0, _batches(0))
    before = {name: _weights(network) for name, network in stage.networks.items()}
    averages = copy.deepcopy(stage.student.ema.values)
    broken = _batches(1)
    for batch in broken:
        batch.tensors["z_lr"][0, 0, 0, 0, 0] = float("nan")
    log = stage.train_step(1, broken)
    assert log["gradient_norm_student"] == log["gradient_norm_critic"] == float("inf")
    assert (stage.student.skipped, stage.critic.skipped) == (1, 3)
    for name, network in stage.networks.items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], _weights(network), strict=True)), name
    assert all(torch.equal(a, b) for a, b in zip(averages, stage.student.ema.values, strict=True))
    assert stage.train_step(2, _batches(2))["gradient_norm_student"] < float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dmd_weight": 0.0, "gan_weight": 0.0, "feature_matching_weight": 0.0}, "there is no loss"),
        ({"schedule": "sequential"}, "sequential_dmd_steps"),
        ({"time_range": (0.9, 0.1)}, "time_range"),
        ({"tap_fractions": ()}, "tap_fractions"),
        ({"guidance_time_range": (0.5, 0.9)}, "real_score_guidance"),
        ({"guidance_time_range": (0.9, 0.5), "real_score_guidance": 1.0}, "guidance_time_range"),
        ({"data_forcing_weight": 1.0, "dmd_weight": 0.0}, "dmd_weight"),
        ({"r1_weight": 1.0, "gan_weight": 0.0, "feature_matching_weight": 0.0}, "gan_weight"),
    ],
)
def test_configuration_refuses_nonsense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DualStreamConfig(**changes)
