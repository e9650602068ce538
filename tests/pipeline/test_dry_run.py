"""`--dry-run`: the numbers are those of the run, the memory is what the run takes, and nothing is written."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from common.live_bytes import LiveBytes
from common.video_probe import ffmpeg_binary
from common.video_reader import read_video
from pipeline.dry_run import tiles_of_a_window, windows_of
from pipeline.memory_estimate import MemoryEstimate
from pipeline.model.vae import decode_latents, encode_video
from pipeline.upscale_options import DEFAULT_MODEL
from pipeline.video_windows import Windows, split_video
from pipeline.vsr_pipeline import Tiling, open_pipeline
from tests.commands import run


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "in.mp4"
    source = "testsrc2=s=64x48:r=25:d=2"
    subprocess.run([ffmpeg_binary(), "-v", "error", "-f", "lavfi", "-i", source, str(path)], check=True)
    return path


def test_it_says_what_would_be_done_and_writes_nothing(video, upscale, model_folder, tmp_path):
    before = sorted(os.listdir(tmp_path))
    done = upscale(video, tmp_path / "new" / "out.mp4", "--model", model_folder, "--dry-run", "--height", 96)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == before
    lines = done.stdout.splitlines()
    assert lines[0] == "input   64x48, 50 frames at 25 frames/s"
    assert lines[1] == "output  128x96, h264, 8 bits; the model makes 256x192"
    assert lines[2].startswith("windows at least 3 of 21 frames") and lines[2].endswith(
        "encode 1, transformer 1, decode 1"
    )
    assert [line.split()[0] for line in lines[7:11]] == ["640x360", "1280x720", "1920x1080", "3840x2160"]
    assert all(float(whole) > float(tiled) for _, whole, _, tiled in map(str.split, lines[8:11]))
    assert "GiB are free" in lines[11] and lines[12].startswith("time    unknown before the first part")


def test_a_dry_run_refuses_what_the_run_would(video, upscale, tmp_path):
    done = upscale(video, video, "--bicubic", "--dry-run")
    assert done.returncode == 2 and "it is the input" in done.stderr


@pytest.mark.parametrize("frames", [1, 21, 22, 37, 38, 53, 54, 200])
def test_windows_are_counted_as_they_are_made(frames):
    video = (np.full((16, 16, 3), 90, np.uint8) for _ in range(frames))
    assert windows_of(frames, Windows()) == len(list(split_video(video, Windows())))


def test_tiles_are_counted_as_they_are_made(model_folder):
    tiling = Tiling(transformer_tile_px=96, vae_tile_px=128, decode_tile_px=64, overlap_px=32)
    pipeline = open_pipeline(model_folder)
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    pipeline(np.zeros((5, 40, 60, 3), np.uint8), tiling=tiling)
    counts = tiles_of_a_window(tiling, 240, 160)
    assert counts["transformer"] == len(calls) == 2 * 4 and counts["decode"] > counts["encode"] > 1


@pytest.mark.parametrize("model", ["tiny", "small"])
def test_predicted_memory_is_what_the_networks_take(model, model_folder):
    """Every tensor of a real run on the CPU is counted: within a tenth, but for the attention's scratch."""
    folder: Path = model_folder if model == "tiny" else DEFAULT_MODEL
    pipeline, height, width = open_pipeline(folder), 128, 192
    predicted = MemoryEstimate(folder).window(9, width, height, Tiling())
    pixels = torch.zeros(1, 3, 9, height, width)
    with LiveBytes() as live, torch.no_grad():
        z = encode_video(pipeline.vae, pixels)
    assert predicted.encode == pytest.approx(live.peak + pixels.nbytes, rel=0.1)
    prompt = pipeline.prompts.embed([""])
    with LiveBytes() as live, torch.no_grad():
        pipeline.transformer(z, torch.ones(1), z, prompt)
    assert predicted.transformer == pytest.approx(live.peak + pixels.nbytes + 4 * z.nbytes, rel=0.1)
    with LiveBytes() as live:
        decode_latents(pipeline.vae, z)
    assert predicted.decode == pytest.approx(live.peak + pixels.nbytes + 2 * z.nbytes, rel=0.1)
    weights = sum(value.nbytes for part in (pipeline.vae, pipeline.transformer) for value in part.parameters())
    assert predicted.weights == weights


def test_predicted_memory_on_a_cpu_is_what_a_process_takes():
    """Resident memory: what lives, with the copies of oneDNN and the holes of the heap."""
    # A fork's heap holds what its parent left. Between runs it differs by a fifth, by when threads give memory back.
    done = run("benchmarks/upscale.py", "--window-of", "64x48", warm=False)
    measured = int(done.stdout.split()[-1])
    predicted, lives = (
        estimate.window(Windows().frames, 256, 192, Tiling()).encode
        for estimate in (MemoryEstimate(DEFAULT_MODEL, codec="fast", device=device) for device in ("cpu", "cuda"))
    )
    assert lives < 0.9 * predicted and 0.9 * predicted < measured < 1.25 * predicted


def test_a_known_rate_gives_the_time_that_is_left(video, upscale, model_folder, tmp_path, monkeypatch):
    output, options = tmp_path / "out.mp4", ("--model", model_folder, "--window", 9, "--overlap", 2)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.upscale.finish", interrupted)
        assert upscale(video, output, *options, "--part-frames", 20).returncode == 130
    (tmp_path / ".out.mp4.parts" / "part-00001.json").unlink()
    done = upscale(video, output, *options, "--dry-run")
    assert done.returncode == 0 and "s of the model for the rest" in done.stdout.splitlines()[-1]
    assert upscale(video, output, *options).returncode == 0 and len(read_video(output)) == 50
