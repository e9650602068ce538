"""Numbers and pictures of a run: metrics.jsonl, previews, wandb without an account."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datagen.dataset.loader import Batch
from pipeline.model.tiny_vae import TinyVideoVAE
from pipeline.model.vae import decode_latents
from tests.trainer import toys
from trainer.config import TrackingConfig
from trainer.engine.process_group import World
from trainer.monitoring.tracking import Tracker
from trainer.monitoring.validation import Validation, psnr
from trainer.stages import STAGES

OFF = TrackingConfig(wandb="off")


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    tracker = Tracker(OFF, tmp_path, "run", {}, start=0)
    for step in range(5):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    tracker = Tracker(OFF, tmp_path, "run", {}, start=3)
    tracker.log(3, {"loss": 2.0})
    tracker.close()
    assert steps(tmp_path) == [0, 1, 2, 3]


def test_wandb_offline_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked something"))
    tracker = Tracker(TrackingConfig(wandb="offline"), tmp_path, "run", {"seed": 1}, start=0)
    tracker.log(0, {"loss": 1.0})
    tracker.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert steps(tmp_path) == [0]


def test_wandb_online_without_an_account_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb.api, "_api", None, raising=False)
    monkeypatch.setattr(type(wandb.api), "api_key", None, raising=False)
    with pytest.raises(UserError, match="wandb login"):
        Tracker(TrackingConfig(wandb="online"), tmp_path, "run", {}, start=0)


KEYS = ["a", "b"]


class Previewed:
    """The part of a stage that validation looks at."""

    def __init__(self, shown: dict[str, torch.Tensor]) -> None:
        self.previews = lambda batch: {
            name: torch.cat([clips[KEYS.index(key)][None] for key in batch.keys]) for name, clips in shown.items()
        }
        self.target = lambda batch: batch.tensors["z_hr"]
        self.exported = self
        self.averaged = nullcontext
        self.spec = STAGES["base"]


def test_validation_numbers_and_image(tmp_path: Path, world: World) -> None:
    batch: Batch = toys.batch(KEYS)
    z_hr = batch.tensors["z_hr"]
    torch.manual_seed(0)
    vae = TinyVideoVAE(z_dim=toys.LATENT[0], hidden_dim=8, num_blocks=1)
    tracker = Tracker(OFF, tmp_path, "run", {}, start=0)
    shown = {"perfect": z_hr, "off": z_hr + 0.5}
    values = Validation(batch, vae).look(Previewed(shown), 7, tracker)  # type: ignore[arg-type]
    tracker.close()
    assert values["validation/perfect/latent_mse"] == 0 and values["validation/perfect/psnr"] == 100
    assert values["validation/off/latent_mse"] == pytest.approx(0.25)
    pixels = [((decode_latents(vae, z).double().numpy() + 1) / 2) for z in (z_hr, shown["off"])]
    errors = ((pixels[0] - pixels[1]) ** 2).mean(axis=(1, 2, 3, 4))
    assert values["validation/off/psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-3)
    preview = Image.open(tmp_path / "previews" / "previews-00000007.png")
    assert preview.size == (4 * 48, 32 + 14), "z_lr, two previews and the target, each 48 x 32 px under its name"


def test_psnr_of_a_known_error() -> None:
    clip = torch.zeros(3, 1, 4, 4)
    assert psnr(clip, clip + 0.2) == pytest.approx(20.0)  # 0.1 of the range [0, 1]


def test_a_vae_without_tiles_that_fills_the_memory_is_named(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    batch: Batch = toys.batch(["a"])
    vae = TinyVideoVAE(z_dim=toys.LATENT[0], hidden_dim=8, num_blocks=1)
    monkeypatch.setattr(vae, "decode", full)
    tracker = Tracker(OFF, tmp_path, "run", {}, start=0)
    with pytest.raises(UserError, match="TinyVideoVAE decodes no tiles"):
        Validation(batch, vae).look(Previewed({"perfect": batch.tensors["z_hr"]}), 7, tracker)  # type: ignore[arg-type]
