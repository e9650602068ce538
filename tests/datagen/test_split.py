"""Held-out sources: none on both sides, none whose copy is trained on, none that moves as a collection grows."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from common.errors import UserError
from common.lossless_clip import read_window, write_lossless
from common.storage import open_folder
from datagen.config import DatagenConfig, FilterConfig
from datagen.dataset.dataset import ShardDataset
from datagen.dataset.loader import ShardReader
from datagen.dataset.shard_format import read_manifest
from datagen.dataset.verify import faults
from datagen.duplicates import first_marked
from datagen.job_folder import begin
from datagen.plan import Plan, deciding, make_plan
from datagen.split import held_out_contents
from tests.datagen.conftest import build_here, contents, start_shared_ray, write_videos
from tests.datagen.test_plan import CONFIG, surveyed
from tests.datagen.test_shard_writing import written

SPLIT = CONFIG.model_copy(update={"validation_share": 0.2})
SHARE = ("--set", "datagen.validation_share=0.4")


def sides(plan: Plan) -> tuple[set[str], set[str]]:
    """Sources of the training samples, and held-out ones."""
    training = len(plan.samples) - (plan.held_out or 0)
    return {s.source for s in plan.samples[:training]}, {s.source for s in plan.samples[training:]}


def test_a_growing_collection_moves_no_source() -> None:
    names = [f"{index:03d}.mp4" for index in range(300)]
    before = [make_plan([surveyed(name) for name in names[:count]], SPLIT, {}) for count in (30, 100, 300)]
    for small, large in itertools.pairwise(map(sides, before)):
        assert small[0] < large[0] and small[1] < large[1]
    assert 40 < len(sides(before[-1])[1]) < 80  # of 300, a fifth
    # neither does a new name
    renamed = [surveyed(name, source=replace(surveyed(name).source, id=f"x{name}")) for name in names]
    assert sides(make_plan(renamed, SPLIT, {}))[1] == {f"x{name}" for name in sides(before[-1])[1]}
    assert sides(make_plan([surveyed(n) for n in names], SPLIT.model_copy(update={"seed": 1}), {})) != sides(before[-1])


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
def test_of_two_or_more_sources_each_side_has_one(share: float) -> None:
    assert not held_out_contents(["a", "a"], share, 0) and not held_out_contents("abc", 0, 0)
    for count, seed in itertools.product((2, 3, 10), range(20)):
        names = [str(index) for index in range(count)]
        assert 1 <= len(held_out_contents(names, share, seed)) < count


def test_no_shard_holds_both_and_no_split_is_as_before() -> None:
    surveys = [surveyed(str(index)) for index in range(25)]
    plan, plain = make_plan(surveys, SPLIT, {}), make_plan(surveys, CONFIG, {})
    held_out = sides(plan)[1]
    for index, shard in enumerate(plan.shards()):
        assert {sample.source in held_out for sample in shard} == {plan.split_of(index) == "validation"}
    assert sorted(sample.key for sample in plan.samples) == sorted(sample.key for sample in plain.samples)
    assert plain.held_out is None and {plain.split_of(index) for index in range(13)} == {None}
    assert "validation_share" not in deciding(CONFIG) and plain.hash != plan.hash


@pytest.mark.parametrize("distance", [13, 0])
def test_a_copy_of_a_held_out_source_is_no_training_source(distance: int) -> None:
    config = SPLIT.model_copy(update={"filters": FilterConfig(duplicate_distance=distance)})
    surveys = [surveyed(str(index)) for index in range(20)]
    training, held_out = sides(make_plan(surveys, config, {}))
    copied, other = min(held_out), min(training)
    (window,) = surveyed(copied).windows
    near = tuple(f"{int(text or '', 16) ^ 0b1001:016x}" for text in window.hashes)
    own = replace(surveyed("own").windows[0], start=9)
    copy = surveyed("copy", content=f"of {other}", windows=(own, replace(window, start=30, hashes=near)))
    # before the original in the order of the sources, which is what decides among training sources
    plan = make_plan([copy, *(survey for survey in surveys if survey.source.id != other)], config, {})
    assert sides(plan) == (training - {other}, held_out)
    line = {"source": "copy", "reason": f"copy of held-out {copied}: frame 30 is like frame 0"}
    assert line in plan.rejected


def test_nothing_left_to_train_on_is_said(tmp_path: Path) -> None:
    hashes = surveyed("a").windows[0].hashes
    plan = make_plan([surveyed(name, hashes=hashes) for name in "abc"], SPLIT, {})
    with pytest.raises(UserError, match=r"nothing is left to train on: .* for instance . \(copy of held-out"):
        begin(open_folder(tmp_path), plan, [], SPLIT, {})


def test_near_marked_windows_are_those_of_a_comparison_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, (40, 3), np.uint64)
    hashes = np.concatenate([base ^ (rng.integers(0, 2**20, base.shape, np.uint64) * copy) for copy in (0, 1, 1)])
    structured = rng.random(hashes.shape) > 0.05
    marked = rng.random(len(hashes)) > 0.7
    expected = []
    for index in range(len(hashes)):
        near = [
            other
            for other in np.flatnonzero(marked)
            if structured[index, 1]
            and (structured[index] == structured[other]).all()
            and all(int(hashes[index, k] ^ hashes[other, k]).bit_count() < 13 for k in range(3) if structured[index, k])
        ]
        expected.append(index if marked[index] else min(near, default=-1))
    assert first_marked(hashes, structured, marked, 13).tolist() == expected
    assert 10 < sum(value >= 0 and value != index for index, value in enumerate(expected)) < 80


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos, and two of them once more by another codec."""
    folder = write_videos(tmp_path_factory.mktemp("copies"))
    for index in (0, 1):
        write_lossless(folder / f"sub/video{index}.mp4", read_window(folder / f"sub/video{index}.mkv", 0, None))
    return folder


@pytest.fixture(scope="module")
def split(copies: Path, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("split") / "dataset"
    start_shared_ray()
    build_here(config_file, copies, output, "--workers", "2", *SHARE)
    return output


def sources_of(dataset: Path, side: str) -> set[str]:
    samples, _ = ShardDataset.open(dataset, split=side)  # type: ignore[arg-type]
    return {samples[index].metadata()["source"] for index in range(len(samples))}


@pytest.mark.distributed
def test_a_split_dataset_has_two_sides_for_every_reader(split: Path) -> None:
    training, held_out = sources_of(split, "train"), sources_of(split, "validation")
    assert training and held_out and training | held_out == sources_of(split, "all")
    assert not {Path(name).stem for name in training} & {Path(name).stem for name in held_out}
    manifest = read_manifest(open_folder(split))
    assert manifest.has_validation and manifest.extra["counts"]["held_out"] == 3 * len(held_out)
    report = (split / "report.html").read_text()
    assert "of them held out" in report
    reasons = {(of, why): n for of, table in manifest.extra["left_out"].items() for why, n in table.items()}
    assert reasons.pop(("sources", "unreadable")) == 1
    assert sum(reasons.values()) == manifest.extra["counts"]["filtered"] > 0
    assert report.count("data:image/jpeg") == manifest.samples + len(reasons), "an example of each reason"
    for side, expected in (("train", training), ("validation", held_out)):
        reader = ShardReader(split, seed=0, global_batch_size=1, split=side)  # type: ignore[arg-type]
        batches = itertools.islice(reader, len(reader))
        assert {batch.metadata[0]["source"] for batch in batches} == expected
    urls = sorted(str(path) for path in split.glob("shards/*.tar"))
    plain = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    assert sum(1 for _ in plain) == manifest.samples
    assert list(faults(open_folder(split))) == []


@pytest.mark.distributed
def test_both_sides_resume_with_the_same_bytes(shared_ray: None, tmp_path: Path) -> None:
    plan = make_plan([surveyed(str(index)) for index in range(25)], SPLIT, {})
    output = tmp_path / "dataset"
    written(output, plan)
    before = contents(output)
    sidecars = sorted(output.glob("shards/*.json"))
    assert {json.loads(before[f"shards/{path.name}"])["split"] for path in sidecars} == {"train", "validation"}
    for path in (sidecars[0], sidecars[-1]):
        path.unlink()
    written(output, plan)
    assert contents(output) == before


@pytest.mark.distributed
def test_verify_names_a_source_on_both_sides(split: Path, tmp_path: Path) -> None:
    shutil.copytree(split, tmp_path / "dataset")
    path = tmp_path / "dataset/manifest.json"
    document = json.loads(path.read_text())
    first, second = document["shards"][:2]
    assert first["split"] == second["split"] == "train"
    first["split"] = "validation"
    path.write_text(json.dumps(document))
    assert any("is held out and is trained on" in fault for fault in faults(open_folder(tmp_path / "dataset")))


def test_a_dataset_without_a_split_is_for_training(dataset: Path) -> None:
    keys = [ShardDataset.open(dataset, split=side)[0].fingerprint for side in ("train", "all")]  # type: ignore[arg-type]
    assert keys[0] == keys[1]
    with pytest.raises(UserError, match="holds no readable validation sample"):
        ShardReader(dataset, seed=0, global_batch_size=1, split="validation")
    with pytest.raises(UserError, match="holds no validation sample"):
        ShardDataset.open(dataset, split="validation")
    assert DatagenConfig().validation_share == 0 and b"split" not in (dataset / "manifest.json").read_bytes()
