"""Trouble while shards are made, with the real command: said in one line, never taken for a clip's fault, repaired."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from common.config import load_section
from common.errors import StorageError
from common.lossless_clip import write_lossless
from common.storage import StorageConfig, open_folder
from datagen.config import DatagenConfig
from datagen.dataset.loader import ShardReader
from datagen.dataset.shard_format import Sample
from datagen.dataset.verify import faults
from datagen.encode.clip import Fault, make_clip
from datagen.encode.ray_jobs import _degraded, _EncodeActor, _samples
from datagen.sources import Source
from datagen.survey.decoder_process import survey_isolated
from pipeline.model.config import ModelConfig
from tests.commands import run
from tests.datagen.conftest import (
    VARIANTS,
    build_command,
    build_here,
    contents,
    moving_picture,
    one_line,
    refused,
    said_here,
)
from tests.datagen.test_clip import plans_of
from tests.datagen.trouble import entry
from tests.small_disk import mounted

FEW_ATTEMPTS = ("--set", "storage.attempts=2")


@pytest.mark.distributed
def test_a_wrong_threshold_and_unmounted_inputs_cost_nothing(
    shared_ray: None, begun: Path, videos: Path, config_file: Path, tmp_path: Path
) -> None:
    survey = contents(begun)
    line = refused(config_file, videos, begun, *VARIANTS, "--set", "datagen.filters.min_luma=250")
    assert "no window can be used" in line and "is below 250" in line
    assert contents(begun) == survey, "more than the survey, or less"

    inputs = tmp_path / "in"
    shutil.copytree(videos, inputs)

    def unmount() -> None:
        while not (begun / "plan.json").exists():
            time.sleep(0.002)
        inputs.rename(tmp_path / "away")

    with ThreadPoolExecutor() as pool:
        pool.submit(unmount)
        status, said = said_here(config_file, inputs, begun, *VARIANTS, *FEW_ATTEMPTS)
    line = one_line(status, said)
    assert f"{inputs}/sub/video" in line and "cannot be read: No such file" in line
    assert "survey:" not in said, "the survey was made again"
    assert contents(begun) == survey, "a shard was committed, or something was lost"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, which the survey fits in and a few shards."""
    with mounted(tmp_path / "disk", "2m") as place:
        yield place


@pytest.mark.distributed
def test_a_full_disk_is_said_and_what_was_committed_stays(
    whole: Path, begun: Path, videos: Path, config_file: Path, small_disk: Path
) -> None:
    output = small_disk / "dataset"
    shutil.copytree(begun, output)
    # with a Ray of its own, whose end must not wait for the writers
    done = run(*build_command(config_file, videos, output, *VARIANTS), warm_children=True)
    line = one_line(done.returncode, done.stderr)
    assert "cannot be written: No space left on device" in line
    left = contents(output)
    assert "shards/shard-000000.json" in left and "manifest.json" not in left
    # what a resumed job goes on from: tests/datagen/test_build.py
    assert left.items() <= contents(whole).items()


@pytest.mark.distributed
def test_clips_that_kill_their_worker_are_quarantined_and_can_be_tried_again(
    shared_ray: None, begun: Path, videos: Path, config_file: Path, tmp_path: Path
) -> None:
    orders, config = tmp_path / "orders", tmp_path / "config.yaml"
    document = yaml.safe_load(config_file.read_text())
    document["datagen"]["degradation"] = {"weights": {"a": 1.0}, "recipes": {"a": {"extra": [entry(orders)]}}}
    config.write_text(yaml.safe_dump(document))
    orders.write_text("kill")
    build_here(config, videos, begun)
    failed = {line["key"] for line in failures_in(begun)}
    assert 0 < len(failed) < 12
    assert all("ends the process that works on it" in line["reason"] for line in failures_in(begun))
    assert len(ShardReader(begun, seed=0, global_batch_size=1)) == 12 - len(failed)
    assert list(faults(open_folder(begun))) == []
    before = contents(begun)

    assert build_here(config, videos, begun) == "" and contents(begun) == before, "tried again without --retry-failed"
    # now they reach the VAE, whose actor trips over them
    orders.write_text("halve")
    build_here(config, videos, begun, "--retry-failed")
    assert {line["key"]: line["reason"][:15] for line in failures_in(begun)} == dict.fromkeys(failed, "VAE: ValueError")
    orders.unlink()
    build_here(config, videos, begun, "--retry-failed")
    assert failures_in(begun) == []
    assert len(ShardReader(begun, seed=0, global_batch_size=1)) == 12
    assert list(faults(open_folder(begun))) == []


def failures_in(dataset: Path) -> list[dict[str, Any]]:
    """Lines of quarantine.jsonl about samples that could not be made."""
    lines = map(json.loads, (dataset / "quarantine.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "failed"]


def test_a_file_out_of_reach_is_no_bad_video(config_file: Path, tmp_path: Path) -> None:
    config = load_section(config_file, "datagen", DatagenConfig)
    write_lossless(tmp_path / "a.mkv", moving_picture(9, 64, 64, 0))
    plans, storage = plans_of(tmp_path / "a.mkv", config, 0), StorageConfig(attempts=2)
    (tmp_path / "a.mkv").write_bytes(b"this is no video")
    made = make_clip(plans, config, storage)
    assert isinstance(made, Fault) and "not a video" in made.reason
    (tmp_path / "a.mkv").unlink()
    with pytest.raises(StorageError, match=r"a\.mkv cannot be read: No such file"):
        make_clip(plans, config, storage)
    with pytest.raises(StorageError):
        survey_isolated(Source("a.mkv", str(tmp_path / "a.mkv")), config, storage)


def test_one_clip_that_the_vae_cannot_encode_costs_no_other(config_file: Path, tmp_path: Path) -> None:
    config = load_section(config_file, "datagen", DatagenConfig)
    vae = load_section(config_file, "model", ModelConfig).vae
    write_lossless(tmp_path / "a.mkv", moving_picture(9, 64, 64, 0))
    plans = plans_of(tmp_path / "a.mkv", config, 0)
    made = make_clip(plans, config, StorageConfig())
    assert not isinstance(made, Fault)
    texts = pa.chunked_array([[json.dumps([asdict(plan) for plan in plans])]])
    good, bad = (_degraded(texts, clip, 1, b"") for clip in (made, replace(made, hr=made.hr[:7])))
    rows = _EncodeActor(str(vae), config)(pa.concat_tables([good, bad, good])).to_pylist()
    first, fault, last = (next(_samples(row, {})).made for row in rows)
    assert isinstance(first, Sample) and first == last
    assert isinstance(fault, Fault) and fault.reason.startswith("VAE: ValueError")


@pytest.mark.distributed
def test_latents_that_are_not_finite_are_no_samples(
    shared_ray: None, begun: Path, videos: Path, config_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "vae"
    shutil.copytree(load_section(config_file, "model", ModelConfig).vae, broken)
    (file,) = broken.glob("*.safetensors")
    save_file({name: torch.full_like(weight, torch.nan) for name, weight in load_file(file).items()}, file)
    survey = contents(begun)
    line = refused(config_file, videos, begun, *VARIANTS, "--set", f"model.vae={broken}")
    assert "12 of 36 samples of the job failed" in line and "its latent is not finite (NaN or infinity)" in line
    assert contents(begun) == survey, "shards without a sample were committed"
