"""`trainer.latent_crop`: a random part of each latent, the same of all latents of a sample, drawn anew each step."""

from __future__ import annotations

import json

import pytest
import torch

from common.errors import UserError
from datagen.dataset.loader import Batch
from tests.trainer.presets import run_command, write_preset
from trainer.stages.crops import crop_latents


def batch(samples: int = 3) -> Batch:
    z = torch.arange(samples * 2 * 3 * 6 * 8, dtype=torch.float32).view(samples, 2, 3, 6, 8)
    keys = [f"k{i}" for i in range(samples)]
    return Batch(keys, {"z_hr": z, "z_lr": -z}, [{}] * samples)


def test_parts_are_contiguous_alike_and_of_the_step() -> None:
    whole, seen = batch(), set()
    for step in range(40):
        part = crop_latents(whole, (2, 4), 0, "base", step)
        assert torch.equal(part.tensors["z_hr"], -part.tensors["z_lr"]) and part.keys == whole.keys
        for z, of in zip(part.tensors["z_hr"], whole.tensors["z_hr"], strict=True):
            y, x = divmod(int(z[0, 0, 0, 0] - of[0, 0, 0, 0]), 8)
            assert torch.equal(z, of[:, :, y : y + 2, x : x + 4])
            seen.add((y, x))
    assert seen == {(y, x) for y in range(5) for x in range(5)}  # every place is reached


def test_a_sample_has_the_same_part_in_any_batch() -> None:
    whole = batch()
    alone = Batch(whole.keys[1:2], {name: z[1:2] for name, z in whole.tensors.items()}, whole.metadata[1:2])
    together = crop_latents(whole, (3, 3), 5, "base", 7).tensors["z_hr"][1:2]
    assert torch.equal(crop_latents(alone, (3, 3), 5, "base", 7).tensors["z_hr"], together)


def test_what_cannot_be_cropped_is_refused() -> None:
    with pytest.raises(UserError, match=r"latent_crop \[7, 4\] is larger than z_hr, \[6, 8\]; lower it"):
        crop_latents(batch(), (7, 4), 0)
    frames = Batch(["k"], {"hr": torch.zeros(1, 5, 8, 8, 3, dtype=torch.uint8)}, [{}])
    with pytest.raises(UserError, match="latent_crop: the stage reads hr, which is no latent; set it to null"):
        crop_latents(frames, (2, 2), 0)


def test_training_sees_the_parts(tmp_path) -> None:
    """Real runs: the loss of the first step differs from that on whole latents; too large a part is one line."""
    preset, losses = write_preset(tmp_path), []
    for crop in ("null", "[2,2]", "[64,64]"):
        output = tmp_path / crop
        arguments = ["--config", preset, "--stage", "base", "--data", tmp_path / "clips", "--output", output]
        settings = [f"trainer.latent_crop={crop}", "trainer.schedules.base.steps=1"]
        done = run_command(*arguments, *(word for setting in settings for word in ("--set", setting)))
        if crop == "[64,64]":
            assert done.returncode == 2 and "trainer.latent_crop [64, 64] is larger than z_" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses.append(next(row["loss"] for row in rows if "loss" in row))
    assert losses[0] != losses[1]
