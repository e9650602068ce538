"""`--offload`, `--compile`, `--vae-dtype`: the same frames with less memory, less time or other numbers."""

import json

import numpy as np
import pytest
import torch

from common.live_bytes import LiveBytes
from common.video_reader import read_video
from common.video_writer import VideoWriter
from pipeline.memory_estimate import MemoryEstimate
from pipeline.model.compile_blocks import compile_blocks
from pipeline.offload import Offload
from pipeline.upscale_options import DEFAULT_MODEL, parse_arguments
from pipeline.vsr_pipeline import Tiling, open_pipeline


def clip(count=9, height=16, width=24):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "in.mkv"
    with VideoWriter(path, width=24, height=16, frame_rate=25, quality="lossless") as writer:
        writer.write(clip())
    return path


def test_offloaded_networks_take_turns(model_folder):
    """A CPU is its own host: copies stand for what would be on a GPU, and are where the computing is."""
    expected = open_pipeline(model_folder)(clip()).frames
    pipeline = open_pipeline(model_folder, offload=True)
    home = {name: next(getattr(pipeline, name).parameters()).data_ptr() for name in ("vae", "transformer")}
    away = []

    def look(*_):
        away.append({name for name in home if next(getattr(pipeline, name).parameters()).data_ptr() != home[name]})

    pipeline.transformer.register_forward_hook(look)
    encode, decode = pipeline.vae.encode, pipeline.vae.decode
    pipeline.vae.encode = lambda *values: (look(), encode(*values))[1]
    pipeline.vae.decode = lambda *values: (look(), decode(*values))[1]
    assert np.array_equal(pipeline(clip()).frames, expected)
    assert away == [{"vae"}, {"transformer"}, {"vae"}]
    look()
    assert away[-1] == set(), "all are home again"


def test_a_network_comes_home_from_a_turn_that_fails():
    network = torch.nn.Linear(2, 2)
    before = network.weight.data_ptr()
    with pytest.raises(torch.cuda.OutOfMemoryError), Offload("cpu").turn(network):
        assert network.weight.data_ptr() != before
        raise torch.cuda.OutOfMemoryError
    assert network.weight.data_ptr() == before


def test_memory_of_turns_is_the_largest_of_them():
    """Predicted for the small model, and what lives at the same time in a real run."""
    tiling, size = Tiling(), (5, 64, 64)
    apart = MemoryEstimate(DEFAULT_MODEL, offload=True).window(*size, tiling)
    together = MemoryEstimate(DEFAULT_MODEL).window(*size, tiling)
    weights = {}
    pipeline = open_pipeline(DEFAULT_MODEL, offload=True)
    for name in ("vae", "transformer"):
        weights[name] = sum(value.nbytes for value in getattr(pipeline, name).parameters())
    assert apart.weights == 0 and together.weights == sum(weights.values())
    assert apart.encode == together.encode + weights["vae"]
    assert apart.transformer == together.transformer + weights["transformer"]
    assert apart.peak < together.peak
    with LiveBytes() as live:
        pipeline(clip(5, 16, 16))
    assert live.peak == pytest.approx(apart.peak, rel=0.1)


def test_offload_needs_a_gpu_and_excludes_compiling(video, upscale, tmp_path):
    for options, words in (
        (("--offload", "--device", "cpu"), "--offload with --device cpu: only a GPU has a memory of its own"),
        (("--offload", "--compile", "--device", "cpu"), "not allowed with argument"),
        (("--bicubic", "--compile"), "--compile means nothing with --bicubic"),
        (("--bicubic", "--vae-dtype", "bf16"), "--vae-dtype means nothing with --bicubic"),
    ):
        done = upscale(video, tmp_path / "out.mkv", *options)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert parse_arguments([str(video), "out.mkv", "--offload", "--device", "cuda"]).offload


def test_the_vae_has_numbers_of_its_own(video, upscale, model_folder, tmp_path):
    options, results = ("--model", model_folder, "--lossless", "--dtype", "fp32", "--device", "cpu"), {}
    for dtype in ("fp32", "bf16"):
        output = tmp_path / f"{dtype}.mkv"
        assert upscale(video, output, *options, "--vae-dtype", dtype).returncode == 0
        results[dtype] = read_video(output)
    assert upscale(video, tmp_path / "plain.mkv", *options).returncode == 0
    assert np.array_equal(read_video(tmp_path / "plain.mkv"), results["fp32"])
    pipeline = open_pipeline(model_folder, dtype={"vae": torch.bfloat16, "default": torch.float32})
    assert (pipeline.vae.dtype, pipeline.transformer.dtype) == (torch.bfloat16, torch.float32)
    assert np.array_equal(pipeline(clip(), colour_fix="wavelet").frames, results["bf16"])
    difference = np.abs(results["fp32"].astype(int) - results["bf16"])
    assert 0 < difference.mean() < 3
    half = MemoryEstimate(model_folder, vae_dtype=torch.bfloat16)
    vae = sum(value.nbytes for value in pipeline.vae.parameters())
    assert half.weights == vae + sum(value.nbytes for value in pipeline.transformer.parameters())


def test_compiled_blocks_give_the_same_frames(video, upscale, model_folder, tmp_path, monkeypatch):
    options = ("--model", model_folder, "--lossless", "--dtype", "fp32", "--device", "cpu")
    assert upscale(video, tmp_path / "plain.mkv", *options).returncode == 0
    stats = tmp_path / "stats.json"
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    done = upscale(video, tmp_path / "out.mkv", *options, "--compile", "--stats", stats)
    assert done.returncode == 0, done.stderr
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    assert json.loads(stats.read_text())["dit_evaluations"] == 1
    plain, compiled = read_video(tmp_path / "plain.mkv").astype(int), read_video(tmp_path / "out.mkv")
    assert np.abs(plain - compiled).max() <= 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Exception, match="--compile needs a C"):
        compile_blocks(open_pipeline(model_folder).transformer, "cpu")
