"""Stored clips with new latents, and turned: the eight symmetries, what a sample becomes, resume, mistakes."""

import shutil
import sys

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.lossless_clip import encode_bytes
from datagen.dataset.dataset import ShardDataset
from datagen.dataset.shard_format import Sample, open_folder, write_manifest, write_shard
from datagen.dataset.verify import faults
from datagen.format_revision import vae_hash
from pipeline.model.tiny_vae import TinyVideoVAE
from pipeline.model.vae import encode_video, load_vae, to_pixels, upsample_low_resolution
from tools.reencode_clips import RECTANGLE, SQUARE, draw, main, turned

SIZES = ((32, 32), (32, 64), (32, 32))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    TinyVideoVAE(z_dim=4, hidden_dim=8, num_blocks=1).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """Three samples in two shards, the second one for validation."""
    rng, samples = np.random.default_rng(0), []
    for index, (height, width) in enumerate(SIZES):
        clips = (rng.integers(0, 256, (5, height // s, width // s, 3), dtype=np.uint8) for s in (1, 4))
        members = dict(zip(("hr.mkv", "lr.mkv"), map(encode_bytes, clips), strict=True))
        samples.append(Sample(f"clip{index}", members | {"latents.safetensors": b"old", "json": b'{"seed": 3}'}))
    folder = open_folder(tmp_path / "data")
    shards = [
        write_shard(folder, 0, samples[:2], split="train"),
        write_shard(folder, 1, samples[2:], split="validation"),
    ]
    write_manifest(folder, "clips", shards, {"plan": "p", "statistics": {}, "versions": {"encoding": "2"}})
    return tmp_path / "data"


def run(monkeypatch, data, vae, output, *more):
    monkeypatch.setattr(
        sys, "argv", ["reencode", "--data", f"{data}", "--vae", f"{vae}", "--output", f"{output}", *more]
    )
    main()
    return ShardDataset.open(output)


def test_the_symmetries_are_all_there_are():
    clip = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    assert len({clip.tobytes(), *(turned(clip, symmetry).tobytes() for symmetry in SQUARE)}) == 8
    assert all(turned(clip[:, :, :3], symmetry).shape == (5, 4, 3, 3) for symmetry in RECTANGLE)
    for square, all_of_them in ((True, SQUARE), (False, RECTANGLE)):
        assert {draw(f"{index}", 0, 1, square) for index in range(100)} == set(all_of_them)
        turns = range(1, len(all_of_them) + 1)
        assert {draw("a", 0, turn, square) for turn in turns} == set(all_of_them)
        with pytest.raises(UserError, match=f"--turns {len(turns) + 1}: .* has {len(turns)}; take fewer"):
            draw("a", 0, len(turns) + 1, square)


def test_a_sample_has_the_latents_of_its_clips(data, vae, tmp_path, monkeypatch):
    before, _ = ShardDataset.open(data)
    after, manifest = run(monkeypatch, data, vae, tmp_path / "out", "--turns", "2", "--seed", "7")
    assert [entry.split for entry in manifest.shards] == ["train", "validation"] * 3
    assert manifest.extra["plan"] == "p" and manifest.extra["reencoded"]["turns"] == 2
    assert "statistics" not in manifest.extra
    assert manifest.extra["versions"] == {"vae": vae_hash(vae), "encoding": "2, turned"}, "not for --reuse"
    assert list(faults(open_folder(tmp_path / "out"))) == []
    network = load_vae(vae)
    for index in range(9):
        turn, row = divmod(index, 3)
        old, new = before[row], after[index]
        hr, lr = old.frames("hr"), old.frames("lr")
        expected = {"seed": 3, "versions": {"vae": vae_hash(vae)}}
        if turn:
            symmetry = draw(old.key, 7, turn, SIZES[row][0] == SIZES[row][1])
            hr, lr = turned(hr, symmetry), turned(lr, symmetry)
            expected["turned"] = {"quarters": symmetry[0], "flipped": symmetry[1]}
        assert new.key == (f"{old.key}-t{turn}" if turn else old.key) and new.metadata() == expected
        assert np.array_equal(new.frames("hr"), hr) and np.array_equal(new.frames("lr"), lr)
        for name, pixels in (("z_hr", to_pixels(hr)), ("z_lr", upsample_low_resolution(lr))):
            with torch.no_grad():
                assert torch.equal(new.tensors("latents")[name], encode_video(network, pixels[None])[0].bfloat16())


def test_several_datasets_become_one(data, vae, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "more")
    both, _ = run(monkeypatch, data, vae, tmp_path / "out", "--data", f"{data}", f"{tmp_path}/more")
    assert [both[index].key for index in range(6)] == ["clip0", "clip1", "clip2"] * 2


def test_a_stopped_job_goes_on_and_no_other_one_does(data, vae, tmp_path, monkeypatch):
    run(monkeypatch, data, vae, tmp_path / "out", "--turns", "1")
    whole = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for name in ("manifest.json", "shards/shard-000001.json"):
        (tmp_path / "out" / name).unlink()
    first = (tmp_path / "out/shards/shard-000000.tar").stat().st_mtime_ns
    run(monkeypatch, data, vae, tmp_path / "out", "--turns", "1")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == whole
    assert (tmp_path / "out/shards/shard-000000.tar").stat().st_mtime_ns == first
    with pytest.raises(UserError, match=r"shard-000000\.tar is of other datasets, another VAE or seed"):
        run(monkeypatch, data, vae, tmp_path / "out", "--turns", "1", "--seed", "1")


def test_without_stored_clips_it_says_so(vae, tmp_path, monkeypatch):
    folder = open_folder(tmp_path / "data")
    write_manifest(folder, "clips", [write_shard(folder, 0, [Sample("a", {"json": b"{}"})])])
    with pytest.raises(UserError, match=r"sample a has no hr\.mkv; build with store_clips: true"):
        run(monkeypatch, tmp_path / "data", vae, tmp_path / "out")
