"""`python -m preference.build` end to end with a small random model: what a pair holds, resume, bad input."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from common.errors import UserError
from common.lossless_clip import encode_bytes
from common.seeding import seeded_noise
from common.storage import open_folder
from datagen.dataset.dataset import ShardDataset
from datagen.dataset.loader import ShardReader
from datagen.dataset.shard_format import Sample, Split, write_manifest, write_shard
from metrics.clips import to_tensor
from metrics.registry import METRICS, create
from pipeline.model.prompts import placeholder_cache
from pipeline.model.tiny_vae import TinyVideoVAE
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import decode_latents
from pipeline.sampling import one_step
from pipeline.vsr_pipeline import VSRPipeline
from preference.build import build
from preference.config import PreferenceConfig
from preference.gallery import gallery
from preference.pair_maker import Outcome, PairJob, PairMaker
from preference.planning import estimate
from preference.ranking import rank
from tests.commands import python, start

SHAPE = (8, 2, 6, 6)  # 5 frames of 48×48
CLIPS = 6
CONFIG = PreferenceConfig(
    pairs=10, metrics="weight-free", niqe_block=16, niqe_clips=4, clips_per_shard=2, dtype="float32"
)
RANKED = {"gmsd": METRICS["gmsd"], "niqe_fitted": METRICS["niqe_fitted"]}


def save_model(folder: Path, steps: int = 1) -> Path:
    torch.manual_seed(0)
    prompts = placeholder_cache(text_dim=16, max_length=4)
    transformer = VSRTransformer(
        latent_channels=SHAPE[0],
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=prompts.config.text_dim,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    vae = TinyVideoVAE(z_dim=SHAPE[0], hidden_dim=8, num_blocks=1)
    pipeline = VSRPipeline(transformer=transformer, vae=vae, prompts=prompts, num_inference_steps=steps, shift=5.0)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    shards = []
    for shard in range(2):
        samples = []
        for row in range(CLIPS // 2):
            latents = {name: torch.randn(SHAPE, generator=generator).bfloat16() for name in ("z_hr", "z_lr")}
            text = json.dumps({"caption": "high quality video"}).encode()
            samples.append(Sample(f"clip-{shard}{row}", {"latents.safetensors": save(latents), "json": text}))
        shards.append(write_shard(folder, shard, samples))
    write_manifest(open_folder(folder), "clips", shards)
    return folder


@pytest.fixture(scope="module")
def pairs(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pairs")
    assert build(PairJob(CONFIG, model, str(data), output)) == CLIPS
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pair_is_what_its_noises_and_scores_say(pairs: Path, model: Path) -> None:
    batch = next(iter(ShardReader(pairs, members=("pair",), seed=0, global_batch_size=CLIPS)))
    pipeline = VSRPipeline.from_pretrained(model)
    for row, record in enumerate(batch.metadata):
        assert set(record["scores"]) == {"gmsd", "niqe_fitted"}
        ranking = rank(record["scores"], RANKED)
        assert (ranking.best, ranking.worst, ranking.gap) == (record["best"], record["worst"], record["gap"])
        assert record["noise_win"] == record["candidate_noises"][ranking.best]
        z_lr = batch.tensors["z_lr"][row : row + 1].float()
        prompt = pipeline.prompts.embed([record["caption"]])
        for name, noise in (("z_win", record["noise_win"]), ("z_lose", record["noise_lose"])):
            epsilon = seeded_noise(SHAPE, *noise)[None]
            with torch.inference_mode():
                made = one_step(lambda *inputs: pipeline.transformer(*inputs).velocity, epsilon, z_lr, prompt)
            assert torch.equal(made[0].bfloat16(), batch.tensors[name][row])
    assert len({json.dumps(record["candidate_noises"]) for record in batch.metadata}) == CLIPS


def test_stored_hr_clip_is_what_candidates_are_compared_with(model: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    hr = torch.randint(0, 256, (5, 48, 48, 3), generator=generator, dtype=torch.uint8).numpy()
    latents = {name: torch.randn(SHAPE, generator=generator).bfloat16() for name in ("z_hr", "z_lr")}
    members = {
        "latents.safetensors": save(latents),
        "hr.mkv": encode_bytes(hr),
        "json": b'{"caption": "high quality video"}',
    }
    shard = write_shard(tmp_path / "data", 0, [Sample("clip", members)])
    write_manifest(open_folder(tmp_path / "data"), "clips", [shard])
    config = CONFIG.model_copy(update={"metrics": "psnr"})
    assert build(PairJob(config, model, str(tmp_path / "data"), tmp_path / "pairs")) == 1
    batch = next(iter(ShardReader(tmp_path / "pairs", members=("pair",), seed=0, global_batch_size=1)))
    record = batch.metadata[0]
    assert record["reference"] == "HR clip"
    made = decode_latents(VSRPipeline.from_pretrained(model).vae, batch.tensors["z_win"].float())[0]
    score = create("psnr")(((made + 1) / 2).transpose(0, 1), to_tensor(hr))
    assert record["scores"]["psnr"][record["best"]] == pytest.approx(score, abs=0.05)  # z_win is bf16


def test_parts_make_the_same_bytes_and_the_last_one_the_manifest(
    pairs: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    assert build(PairJob(CONFIG, model, str(data), tmp_path), part=(1, 2)) is None
    assert not (tmp_path / "manifest.json").exists()
    assert build(PairJob(CONFIG, model, str(data), tmp_path), part=(0, 2)) == CLIPS
    assert contents(tmp_path) == contents(pairs)


def test_killed_job_goes_on_and_keeps_whole_shards(pairs: Path, model: Path, data: Path, tmp_path: Path) -> None:
    config, output = tmp_path / "config.yaml", tmp_path / "pairs"
    settings = CONFIG.model_dump(mode="json")
    config.write_text(json.dumps({"preference": settings}))  # JSON is YAML
    command = ["-m", "preference.build", "--config", config, "--model", model]
    job = start(*command, "--data", data, "--output", output, "--device", "cpu", warm=False)
    first = output / "shards" / "shard-000000.json"
    while job.poll() is None and not first.exists():
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.wait()
    written = first.stat().st_mtime_ns
    assert build(PairJob(CONFIG, model, str(data), output)) == CLIPS
    assert first.stat().st_mtime_ns == written
    whole = {name: text for name, text in contents(output).items() if not name.endswith((".tmp", ".partial"))}
    assert whole == contents(pairs)


def test_close_candidates_are_dropped_with_their_scores(model: Path, data: Path, tmp_path: Path) -> None:
    strict = CONFIG.model_copy(update={"minimum_gap": 1.0, "candidates": 3})
    kept = build(PairJob(strict, model, str(data), tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert kept is not None
    assert kept < CLIPS
    assert manifest["samples"] == kept
    assert manifest["extra"]["dropped"] == CLIPS - kept
    sidecars = [json.loads(path.read_text()) for path in (tmp_path / "shards").glob("*.json")]
    dropped = [record for sidecar in sidecars for record in sidecar["extra"]["dropped"]]
    assert len(dropped) == CLIPS - kept
    assert all(record["gap"] < 1 and len(record["scores"]["gmsd"]) == 3 for record in dropped)


@pytest.fixture(scope="module")
def faulty(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips, the second with NaN in its latent, the third without one."""
    folder = tmp_path_factory.mktemp("faulty")
    dataset, _ = ShardDataset.open(data)
    samples = []
    for position in range(CLIPS):
        stored = dataset[position]
        members = {name: stored.read(name) for name in stored.spans}
        if position == 1:
            latents = stored.tensors("latents")
            latents["z_lr"][0, 0, 0, 0] = torch.nan
            members["latents.safetensors"] = save(latents)
        if position == 2:
            members = {"json": members["json"]}
        samples.append(Sample(stored.key, members))
    write_manifest(open_folder(folder), "clips", [write_shard(folder, 0, samples)])
    return folder


@pytest.mark.distributed
def test_broken_clips_are_replaced_and_any_number_of_actors_makes_the_same_bytes(
    model: Path, faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", python())
    config = CONFIG.model_copy(update={"pairs": 3, "metrics": "gmsd"})
    assert build(PairJob(config, model, str(faulty), tmp_path / "one")) == 3
    sidecars = [json.loads(path.read_text()) for path in sorted((tmp_path / "one/shards").glob("*.json"))]
    assert [key for sidecar in sidecars for key in sidecar["keys"]] == ["clip-00", "clip-10", "clip-11"]
    dropped = [record for sidecar in sidecars for record in sidecar["extra"]["dropped"]]
    assert [(record["key"], record["kind"]) for record in dropped] == [("clip-01", "broken"), ("clip 2", "failed")]
    assert "not finite" in dropped[0]["reason"] and "has no latents" in dropped[1]["reason"]
    extra = json.loads((tmp_path / "one/manifest.json").read_text())["extra"]
    assert extra["dropped_by_kind"] == {"broken": 1, "failed": 1}
    two = config.model_copy(update={"actors": 2, "cpus": 1})
    assert build(PairJob(two, model, str(faulty), tmp_path / "two")) == 3
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_black_candidates_and_candidates_that_hardly_differ_give_no_pair(
    model: Path, data: Path, tmp_path: Path
) -> None:
    def made(**changes: object) -> Outcome:
        config = CONFIG.model_copy(update={"metrics": "gmsd,psnr", **changes})
        return PairMaker(PairJob(config, model, str(data), tmp_path)).make(0)

    assert made().sample
    assert made(minimum_differences={"gmsd": 1.0}).sample  # PSNR is enough
    close = made(minimum_differences={"gmsd": 1.0, "psnr": 100.0}).dropped
    assert close is not None and close["kind"] == "close" and "no score differs by its minimum: gmsd" in close["reason"]
    black = made(black_below=1.0).dropped
    assert black is not None and (black["kind"], black["reason"]) == ("broken", "candidate 0 is black")


def test_a_job_whose_every_clip_is_broken_stops(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preference.build.BROKEN_AT_START", 4)
    config = CONFIG.model_copy(update={"metrics": "gmsd", "black_below": 1.0})
    with pytest.raises(UserError, match=r"each of 4 clips is broken \(candidate 0 is black\)"):
        build(PairJob(config, model, str(data), tmp_path))


def test_the_dry_run_estimates_from_pairs_it_makes(model: Path, data: Path) -> None:
    text = estimate(PairJob(CONFIG, model, str(data), Path()), actors=2)
    assert "6 pairs of 6 clips, 5 candidates each, judged by weight-free" in text
    assert "with 2 actor(s)" in text and "MiB per pair" in text


def test_the_gallery_shows_pairs_with_all_scores(pairs: Path, model: Path, tmp_path: Path) -> None:
    gallery(str(pairs), model, tmp_path / "gallery.html", count=2)
    page = (tmp_path / "gallery.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 3 * 2
    assert "clip-00" in page and "clip-12" in page and "clip-01" not in page
    assert page.count("gmsd ↓") == 2 and "6 pairs, 2 shown" in page


def test_fewer_pairs_than_clips(model: Path, data: Path, tmp_path: Path) -> None:
    assert build(PairJob(CONFIG.model_copy(update={"pairs": 3}), model, str(data), tmp_path)) == 3


def test_held_out_clips_make_held_out_pairs(model: Path, data: Path, tmp_path: Path) -> None:
    """Of six clips, the second and third are held out; the NIQE judge does not know them."""
    dataset, _ = ShardDataset.open(data)
    sides: list[tuple[Split, list[int]]] = [("train", [0]), ("validation", [1, 2]), ("train", [3, 4, 5])]
    shards = []
    for index, (split, positions) in enumerate(sides):
        stored = [dataset[position] for position in positions]
        samples = [Sample(one.key, {name: one.read(name) for name in one.spans}) for one in stored]
        shards.append(write_shard(tmp_path / "data", index, samples, split=split))
    write_manifest(open_folder(tmp_path / "data"), "clips", shards)
    config = CONFIG.model_copy(update={"pairs": 3, "validation_pairs": 1, "niqe_clips": CLIPS})
    assert build(PairJob(config, model, str(tmp_path / "data"), tmp_path / "pairs")) == 4
    keys = {}
    for split in ("train", "validation"):
        side, _ = ShardDataset.open(tmp_path / "pairs", split=split)
        keys[split] = [side[position].key for position in range(len(side))]
    assert keys == {"train": ["clip-00", "clip-10", "clip-11"], "validation": ["clip-01"]}
    with safe_open(tmp_path / "pairs/niqe.safetensors", "np") as niqe:
        assert json.loads(niqe.metadata()["niqe"])["details"]["clips"] == 4


def test_what_cannot_be_built_is_said(
    pairs: Path, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no model in"):
        build(PairJob(CONFIG, tmp_path / "absent", str(data), tmp_path / "out"))
    with pytest.raises(UserError, match="4-step model"):
        build(PairJob(CONFIG, save_model(tmp_path / "four", steps=4), str(data), tmp_path / "out"))
    with pytest.raises(UserError, match="holds pairs"):
        build(PairJob(CONFIG, model, str(pairs), tmp_path / "out"))
    with pytest.raises(UserError, match="another model or another configuration"):
        build(PairJob(CONFIG.model_copy(update={"seed": 1}), model, str(data), pairs))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"lpips needs .*weight-free \(gmsd, niqe_fitted\)"):
        build(PairJob(CONFIG.model_copy(update={"metrics": "paper"}), model, str(data), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
