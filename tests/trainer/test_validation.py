"""Validation: the same clips whatever the number of ranks, through the EMA, constants decoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.model.tiny_vae import TinyVideoVAE
from tests.trainer import toys
from tests.trainer.ranks import run_on_ranks
from trainer.engine.config import DeepSpeedConfig
from trainer.engine.process_group import World
from trainer.monitoring.validation import Validation
from trainer.stages.dual_stream.algorithm import DualStream

KEYS = ["a", "b", "c"]


def small_vae() -> TinyVideoVAE:
    torch.manual_seed(0)
    return TinyVideoVAE(z_dim=toys.LATENT[0], hidden_dim=8, num_blocks=1)


def trained(zero_stage: int, ranks: int, rank: int) -> DualStream:
    """After two rounds, so that EMA and weights differ."""
    engine = DeepSpeedConfig(zero_stage=zero_stage, precision="fp32", persistence_threshold=0)  # type: ignore[arg-type]
    stage = toys.dual_stream(toys.configuration(), engine)
    for step in range(2):
        stage.train_step(step, toys.local_batches(toys.global_batches(step, 4, 2), rank, ranks, 1))
    return stage


def looked(world: World, *, zero_stage: int = 1) -> dict[str, float]:
    """Three clips over the ranks; with two ranks the second one's second clip only keeps step."""
    share = -(-len(KEYS) // world.size)
    stream = [*KEYS, "beyond"]
    batch = toys.batch(stream[world.rank * share : (world.rank + 1) * share])
    validation = Validation(batch, small_vae(), first=world.rank * share, clips=len(KEYS))
    return validation.look(trained(zero_stage, world.size, world.rank), 0, None)


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_ranks_see_what_one_sees(zero_stage: int, world: World) -> None:
    alone = looked(world, zero_stage=zero_stage)
    for found in run_on_ranks(f"{__name__}:looked", 2, zero_stage=zero_stage):
        assert found == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_ema_is_looked_at_and_the_weights_come_back(zero_stage: int, world: World) -> None:
    stage = trained(zero_stage, 1, 0)
    average = stage.student.full_state_dict(ema=True)
    weights = stage.student.full_state_dict()
    batch = toys.batch(["a"])
    own = stage.previews(batch)["student"]
    with stage.student.averaged():
        found = stage.previews(batch)["student"]
    assert not torch.equal(found, own)
    assert torch.equal(stage.previews(batch)["student"], own), "to the last digit"
    assert all(torch.equal(value, stage.student.full_state_dict()[name]) for name, value in weights.items())
    plain = toys.transformer(2)
    plain.load_state_dict(average)
    s = stage._sample(batch, -1, 0)
    with torch.no_grad():
        expected = s.noise_s - plain(s.noise_s, torch.ones(1), s.z_lr, s.prompt).velocity
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_constants_are_decoded_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, calls = small_vae(), []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: calls.append(z.shape[0]) or decode(z))
    validation, stage = Validation(toys.batch(KEYS), vae), trained(1, 1, 0)
    first = validation.look(stage, 0, None)
    again = validation.look(stage, 1, None)
    assert first == again
    assert calls == [1] * (3 * 2 + 3 * 3 + 3 * 3), "targets and z_lr of three clips once, three previews twice"


def test_the_preview_shows_the_first_clip(world: World, tmp_path: Path) -> None:
    class Pictures:
        def image(self, step: int, name: str, image: Any) -> None:
            image.save(tmp_path / "image.png")

        def log(self, step: int, values: dict[str, float]) -> None:
            assert "validation/student/psnr" in values and "validation/z_lr/psnr" in values

    Validation(toys.batch(KEYS), small_vae()).look(trained(1, 1, 0), 0, Pictures())  # type: ignore[arg-type]
    assert (tmp_path / "image.png").exists()
