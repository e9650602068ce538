"""What is made once: HR of a clip with several variants, and z_hr that an earlier dataset holds."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from common.config import load_section
from common.errors import UserError
from common.storage import StorageConfig, open_folder
from datagen.config import ClipConfig, DatagenConfig
from datagen.dataset.loader import ShardReader
from datagen.dataset.shard_format import read_manifest, read_sidecar, shard_name
from datagen.encode.latent_reuse import LATENTS, check_reusable, find_clips, read_latent
from datagen.encode.ray_jobs import clips_of
from datagen.encode.vae_encoder import Encoder
from datagen.plan import SamplePlan, make_plan
from pipeline.model.config import ModelConfig
from tests.datagen.conftest import build_here, contents
from tests.datagen.test_plan import surveyed

LOCAL = StorageConfig()


def test_variants_of_a_clip_travel_together_from_wherever_a_job_goes_on() -> None:
    config = DatagenConfig(clip=ClipConfig(frames=9, crop=(64, 64)), variants=10)
    plans = make_plan([surveyed(source) for source in "abc"], config, {}).samples
    for start, sizes in ((0, [8, 2, 8, 2, 8, 2]), (7, [3, 8, 2, 8, 2]), (9, [1, 8, 2, 8, 2])):
        rows = list(clips_of(plans[start:]))
        assert [len(row) for row in rows] == sizes
        assert [plan for row in rows for plan in row] == plans[start:]
        assert all(len({plan.clip for plan in row}) == 1 for row in rows)


def test_a_clips_latents_do_not_depend_on_what_is_encoded_with_it(config_file: Path) -> None:
    vae = load_section(config_file, "model", ModelConfig).vae
    rng = np.random.default_rng(0)
    hr, other = rng.integers(0, 256, (2, 5, 32, 32, 3), np.uint8)
    lr = rng.integers(0, 256, (3, 5, 8, 8, 3), np.uint8)
    encoder = Encoder(str(vae), 1)
    encoder._batch_size = 3  # what a GPU would take at once
    (alone,), (first,) = encoder.latents([hr], [lr[0]])
    both, all_lr = encoder.latents([hr, other], list(lr))
    assert torch.equal(both[0], alone) and torch.equal(all_lr[0], first) and len(all_lr) == 3
    assert not torch.equal(both[0], both[1])
    nothing, (again,) = encoder.latents([], [lr[0]])
    assert nothing == [] and torch.equal(again, first)


def sample_of(dataset: Path, key: str) -> tuple[SamplePlan, dict[str, str], torch.Tensor]:
    """The plan that sample `key` was made from, the versions of what made it, and its z_hr."""
    reader = ShardReader(dataset, seed=0, global_batch_size=1)
    batch = next(batch for batch in reader if batch.keys == [key])
    (facts,) = batch.metadata
    crop = tuple(facts["crop"][side] for side in ("top", "left", "height", "width"))
    plan = SamplePlan(
        key=key,
        path="",
        start=facts["window"]["start"],
        pts=None,
        frames=facts["window"]["frames"],
        frames_per_second=25.0,
        crop=(crop[0], crop[1], crop[2], crop[3]),
        **{name: facts[name] for name in ("clip", "source", "content", "caption", "variant", "seed")},
    )
    return plan, facts["versions"], batch.tensors["z_hr"][0]


@pytest.mark.distributed
def test_a_latent_is_taken_only_where_the_pixels_are_the_same(whole: Path) -> None:
    key = read_sidecar(open_folder(whole), shard_name(2)).keys[1]
    plan, versions, z_hr = sample_of(whole, key)
    check_reusable(str(whole), versions, LOCAL)
    earlier = find_clips(str(whole), [plan.clip, "unknown"], LOCAL)
    assert list(earlier.places) == [plan.clip]
    place = earlier.places[plan.clip]
    assert torch.equal(load(read_latent(str(whole), place, plan, LOCAL))["z_hr"], z_hr)
    others = ({"content": "of another video"}, {"frames": 5}, {"start": 1}, {"crop": (0, 1, 64, 64)})
    for change in others:
        assert read_latent(str(whole), place, dataclasses.replace(plan, **change), LOCAL) == b""
    for name in ("vae", "encoding"):
        with pytest.raises(UserError, match=f"made with {name} {versions[name]}, this job has another"):
            check_reusable(str(whole), versions | {name: "another"}, LOCAL)
    with pytest.raises(UserError, match="does not exist"):
        check_reusable(str(whole / "nowhere"), versions, LOCAL)


@pytest.mark.distributed
def test_a_new_degradation_is_the_same_with_and_without_reuse(
    shared_ray: None, whole: Path, videos: Path, config_file: Path, tmp_path: Path
) -> None:
    other = ("--set", "datagen.degradation.weights={static: 1.0}")
    build_here(config_file, videos, tmp_path / "without/dataset", *other)
    earlier = tmp_path / "earlier"
    shutil.copytree(whole, earlier)
    # the first sample of a clip is where its latent is looked for
    damaged = read_sidecar(open_folder(earlier), shard_name(0)).members[0][LATENTS]
    tar = bytearray((earlier / shard_name(0)).read_bytes())
    tar[damaged.offset + damaged.length - 1] ^= 1
    (earlier / shard_name(0)).write_bytes(tar)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datagen.survey.survey_cache._survey", lambda sources, *_: (pytest.fail(s.id) for s in sources))
        said = build_here(config_file, videos, tmp_path / "with/dataset", *other, "--reuse", str(earlier))
    assert "failed 0 filtered 0 reused 11" in said  # of twelve clips, one of which is damaged there
    assert contents(tmp_path / "with/dataset") == contents(tmp_path / "without/dataset")
    recipes = read_manifest(open_folder(tmp_path / "with/dataset")).extra["statistics"]["counts"]["recipe"]
    assert recipes == {"static": 12}
