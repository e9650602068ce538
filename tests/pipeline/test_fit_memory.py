"""Tiles and windows that fit into the free memory, and a resumed job that keeps them."""

import itertools

import numpy as np
import pytest
import torch

from common.seeding import seeded_noise
from common.video_reader import read_video
from common.video_writer import VideoWriter
from pipeline.fit_memory import SHORTER, choose, free_bytes
from pipeline.memory_estimate import MemoryEstimate
from pipeline.video_windows import Windows
from pipeline.vsr_pipeline import Tiling

SIZE = (480, 384)


@pytest.fixture(scope="module")
def estimate(model_folder):
    return MemoryEstimate(model_folder)


@pytest.fixture
def video(tmp_path):
    """6 frames of a quarter of SIZE."""
    path = tmp_path / "in.mkv"
    noise = seeded_noise((6, SIZE[1] // 4, SIZE[0] // 4, 3), "fit").mul(40).add(128).clamp(0, 255).to(torch.uint8)
    with VideoWriter(path, width=SIZE[0] // 4, height=SIZE[1] // 4, frame_rate=24, quality="lossless") as writer:
        writer.write(noise.numpy())
    return path


def test_the_first_sizes_that_fit_are_taken(estimate):
    """Whole frames; else smaller tiles, the decoder's first; else the smallest tiles and a shorter window."""
    size = (1280, 960)

    def needed(windows, tiling):
        return estimate.window(windows.frames, *size, tiling).peak

    def chosen(free):
        return choose(Windows(), Tiling(), *size, needed, free, SHORTER)

    whole = needed(Windows(), Tiling())
    assert chosen(whole) == (Windows(), Tiling(), whole)
    windows, tiling, need = chosen(whole - 1)
    assert windows == Windows() and need <= whole - 1 and tiling.decode_tile_px == 640
    smallest = Tiling(256, 256, 256)
    windows, tiling, need = chosen(needed(Windows(), smallest) - 1)
    assert tiling == smallest and windows == SHORTER[0] and need < needed(Windows(), smallest)
    assert chosen(1)[:2] == (SHORTER[-1], smallest), "though it does not fit"
    sizes = [needed(Windows(), Tiling()), *(needed(window, smallest) for window in SHORTER)]
    assert all(a > b for a, b in itertools.pairwise(sizes))


def test_free_memory_is_that_of_this_machine():
    free = free_bytes("cpu")
    assert free is not None and 2**27 < free < 2**44
    assert free_bytes("mps") is None


def test_a_resumed_job_keeps_what_was_chosen(video, upscale, model_folder, tmp_path, monkeypatch):
    options = ("--model", model_folder, "--tile-overlap", 64, "--lossless", "--part-frames", 4, "--device", "cpu")
    tiled = tmp_path / "tiled.mkv"
    chosen = ("--decode-tile", 256, "--vae-tile", 256, "--tile", 256)
    assert upscale(video, tiled, *options, *chosen, "--window", 5, "--overlap", 1).returncode == 0

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    output = tmp_path / "out.mkv"
    short = ("--window", 5, "--overlap", 1)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.fit_memory.free_bytes", lambda _: 1)
        patched.setattr("pipeline.upscale.finish", interrupted)
        done = upscale(video, output, *options, *short)
    assert done.returncode == 130 and "are free: --decode-tile 256 --vae-tile 256 --tile 256" in done.stderr
    assert "memory may not suffice" in done.stderr
    (tmp_path / ".out.mkv.parts" / "part-00001.json").unlink()
    done = upscale(video, output, *options, *short)
    assert done.returncode == 0 and "resuming after" in done.stderr and "are free" not in done.stderr
    assert np.array_equal(read_video(output), read_video(tiled))
    assert upscale(video, tmp_path / "whole.mkv", *options, *short).returncode == 0
    assert not np.array_equal(read_video(tmp_path / "whole.mkv"), read_video(tiled))
