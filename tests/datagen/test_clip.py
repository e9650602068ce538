"""One clip on its way: decoded once, each variant's fate its own, empty crops left out. Without Ray."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load

from common.config import load_section
from common.errors import UserError
from common.lossless_clip import write_lossless
from common.storage import StorageConfig
from datagen.config import DatagenConfig
from datagen.dataset.shard_format import Sample
from datagen.degradation.degrade import degrade_clip
from datagen.degradation.sharpen import SharpenConfig, sharpen_frame
from datagen.encode.clip import Clip, Fault, Variant, make_clip
from datagen.encode.latent_reuse import LATENTS
from datagen.encode.ray_jobs import _degraded, _EncodeActor, _samples
from datagen.format_revision import code_versions
from datagen.plan import SamplePlan, deciding, make_plan
from datagen.sources import Source
from pipeline.model.config import ModelConfig
from tests.datagen.conftest import moving_picture
from tests.datagen.test_plan import surveyed


def plans_of(path: Path, config: DatagenConfig, left: int) -> list[SamplePlan]:
    """Variants of the crop at `left` of the first window of a video of 64 x 160."""
    size = {"width": 64 + left, "height": 64, "frames": 9}
    config = config.model_copy(update={"clip": config.clip.model_copy(update={"crop_position": "center"})})
    plans = make_plan([surveyed("a.mkv", source=Source("a.mkv", str(path)), **size)], config, {}).samples
    return [SamplePlan(**asdict(plan) | {"crop": (0, left, 64, 64)}) for plan in plans]


def test_a_crop_that_shows_nothing_is_left_out_with_its_measure(config_file: Path, tmp_path: Path) -> None:
    video = moving_picture(9, 64, 192, 0)
    video[:, :, 64:128] = 0
    video[:, :, 128:] = 120
    write_lossless(tmp_path / "a.mkv", video)
    config = load_section(config_file, "datagen", DatagenConfig)
    assert isinstance(make_clip(plans_of(tmp_path / "a.mkv", config, 0), config, StorageConfig()), Clip)
    for left, reason in ((64, "black crop: luma 0.0 is below 4.0"), (128, "empty crop: contrast 0.0 is below 4.0")):
        fault = make_clip(plans_of(tmp_path / "a.mkv", config, left), config, StorageConfig())
        assert fault == Fault(reason, "filtered")


def test_a_variant_that_fails_does_not_take_the_others_with_it(config_file: Path, tmp_path: Path) -> None:
    write_lossless(tmp_path / "a.mkv", moving_picture(9, 64, 64, 0))
    config = load_section(config_file, "datagen", DatagenConfig, ["datagen.variants=3"])
    plans = plans_of(tmp_path / "a.mkv", config, 0)
    made = make_clip(plans, config, StorageConfig())
    assert isinstance(made, Clip) and all(isinstance(variant, Variant) for variant in made.variants)
    broken = Clip(made.hr, made.stored, [made.variants[0], Fault("codec gave up"), made.variants[2]])
    actor = _EncodeActor(str(load_section(config_file, "model", ModelConfig).vae), config)
    texts = pa.chunked_array([[json.dumps([asdict(plan) for plan in plans])]])
    tables = [_degraded(texts, part, 3, b"") for part in (made, Fault("no video"), broken)]
    whole, nothing, rest = (list(_samples(row, {})) for row in actor(pa.concat_tables(tables)).to_pylist())
    assert [row.plan for row in whole] == [row.plan for row in nothing] == [row.plan for row in rest] == plans
    assert [row.made for row in nothing] == [Fault("no video")] * 3
    assert rest[1].made == Fault("codec gave up")
    assert rest[0].made == whole[0].made and rest[2].made == whole[2].made
    samples = [row.made for row in whole if isinstance(row.made, Sample)]
    latents = [load(sample.members[LATENTS]) for sample in samples]
    assert len({sample["z_hr"].float().numpy().tobytes() for sample in latents}) == 1
    assert len({sample["z_lr"].float().numpy().tobytes() for sample in latents}) == 3
    # with z_hr from elsewhere, HR does not travel, and the samples are the same
    table = _degraded(texts, made, 3, samples[0].members[LATENTS])
    assert table["hr"][0].as_py() == b""
    (row,) = actor(table).to_pylist()
    assert [(taken.made, taken.reused) for taken in _samples(row, {})] == [(sample, True) for sample in samples]


def test_sharpened_targets_are_the_target_and_what_is_degraded(config_file: Path, tmp_path: Path) -> None:
    write_lossless(tmp_path / "a.mkv", moving_picture(9, 64, 64, 0))
    config = load_section(config_file, "datagen", DatagenConfig, ["datagen.degradation.weights={light: 1.0}"])
    sharpening = config.model_copy(update={"sharpen_targets": SharpenConfig()})
    plans = plans_of(tmp_path / "a.mkv", config, 0)
    plain, made = make_clip(plans, config, StorageConfig()), make_clip(plans, sharpening, StorageConfig())
    assert isinstance(plain, Clip) and isinstance(made, Clip) and isinstance(made.variants[0], Variant)
    expected = np.stack([sharpen_frame(frame, 51, 0.5, 10.0) for frame in plain.hr])
    assert np.array_equal(made.hr, expected) and not np.array_equal(made.hr, plain.hr)
    assert np.array_equal(made.variants[0].lr, degrade_clip(expected, config.degradation, plans[0].seed)[0])


def test_sharpened_targets_decide_the_plan_and_the_versions_only_where_they_are_on(config_file: Path) -> None:
    plain = load_section(config_file, "datagen", DatagenConfig, ["datagen.degradation.weights={light: 1.0}"])
    sharpening = plain.model_copy(update={"sharpen_targets": SharpenConfig(weight=0.3)})
    assert "sharpen_targets" not in deciding(plain) and deciding(sharpening)["sharpen_targets"]["weight"] == 0.3
    assert (
        code_versions(sharpening.sharpen_targets)["encoding"] == code_versions()["encoding"] + ", sharpened 51/0.3/10.0"
    )


def test_sharpening_twice_is_refused(config_file: Path) -> None:
    twice = ["datagen.sharpen_targets={}", "datagen.degradation.weights={light: 1.0, mild: 1.0}"]
    with pytest.raises(UserError, match="the recipe mild sharpens HR again; set its sharpen to null"):
        load_section(config_file, "datagen", DatagenConfig, twice)
