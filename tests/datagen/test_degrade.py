"""The degradation: reproducible to the bit, within its ranges, and like the formulas it stands for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.errors import UserError
from common.lossless_clip import decode_bytes, encode_bytes
from common.video_reader import read_video
from datagen.degradation.degrade import apply_operations, degrade_clip, draw_operations
from datagen.degradation.kernels import TOLERANCE, apply_kernel, gaussian_kernels, sinc_kernels
from datagen.degradation.noise import add_gaussian, add_poisson
from datagen.degradation.recipe import Mixture, Recipe, light, mild, static
from datagen.degradation.sharpen import sharpen_frame
from datagen.degradation.video_compression import through_codec
from tests.commands import run
from tests.datagen.conftest import moving_picture

FRAMES = 5


@pytest.fixture(scope="module")
def hr() -> np.ndarray:
    return moving_picture(FRAMES, 128, 160, 0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))


@pytest.mark.parametrize("seed", range(4))
def test_a_seed_fixes_every_bit(hr: np.ndarray, seed: int) -> None:
    lr, draws = degrade_clip(hr, "mixture", seed)
    assert lr.shape == (FRAMES, 32, 40, 3) and lr.dtype == np.uint8
    again, _ = degrade_clip(hr, "mixture", seed)
    np.testing.assert_array_equal(lr, again)
    recorded = json.loads(json.dumps(draws))["operations"]
    np.testing.assert_array_equal(lr, apply_operations(hr, recorded, seed))
    assert not np.array_equal(lr, degrade_clip(hr, "mixture", seed + 100)[0])


def test_x264_does_not_depend_on_what_memory_held(tmp_path: Path) -> None:
    """With its macroblock tree it did: the same clip gave other streams for other garbage."""
    clips = tmp_path / "clips.npz"
    np.savez(clips, *(moving_picture(9, side, side, side) for side in (44, 66, 82)))
    script = (
        "import hashlib, sys, numpy as np; from datagen.degradation.video_compression import through_codec;"
        "print(*[hashlib.sha256(np.stack(through_codec(list(clip), 'libx264', 9000, 'superfast'))).hexdigest()"
        " for clip in np.load(sys.argv[1]).values()])"
    )
    streams = set()
    for garbage in ("0", "85", "170"):
        environment = os.environ | {"MALLOC_PERTURB_": garbage, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script, str(clips)], capture_output=True, text=True, env=environment, check=True
        )
        streams.add(done.stdout)
    assert len(streams) == 1


def test_draws_stay_in_their_ranges_and_walk_in_small_steps() -> None:
    recipe = Recipe()
    seen = set()
    for seed in range(60):
        operations = draw_operations(recipe, (30, 256, 256, 3), seed)
        names = [operation["op"] for operation in operations]
        seen.update(names)
        assert names[0] == "sharpen" and names.count("noise") == names.count("jpeg") == names.count("codec") == 2
        assert set(names[-3:]) >= {"codec", "resize_to_target"}
        noises = [operation for operation in operations if operation["op"] == "noise"]
        for noise, stage in zip(noises, (recipe.first, recipe.second), strict=True):
            limits, step = (
                (stage.noise.sigma, stage.noise.sigma_step)
                if noise["kind"] == "gaussian"
                else (stage.noise.poisson_scale, stage.noise.poisson_scale_step)
            )
            values = np.array(noise["sigma" if noise["kind"] == "gaussian" else "scale"])
            assert values.min() >= limits[0] and values.max() <= limits[1]
            assert 0 < np.abs(np.diff(values)).max() <= step + 1e-5
        for operation in operations:
            if operation["op"] == "codec":
                assert 1e4 <= operation["bits_per_frame"] <= 1e5  # an HR clip of 256 x 256
    assert {"blur", "resize"} <= seen


def test_kinds_come_with_their_weights() -> None:
    kinds = []
    for seed in range(1500):
        for operation in draw_operations(Recipe(), (1, 64, 64, 3), seed):
            if operation["op"] == "blur" and operation["kind"] != "sinc":
                kinds.append(operation["kind"])
    # of the Gaussian-like kernels, .405 of .9 are isotropic: five standard deviations of the count
    share = kinds.count("iso") / len(kinds)
    assert abs(share - 0.45) < 5 * np.sqrt(0.45 * 0.55 / len(kinds))


def test_static_walks_in_jpeg_only_and_mild_is_milder() -> None:
    for seed in range(20):
        for operation in draw_operations(static(), (8, 64, 64, 3), seed):
            for name, values in operation.items():
                if isinstance(values, list) and name != "quality":
                    assert len(set(values)) == 1
        for operation in draw_operations(mild(), (8, 64, 64, 3), seed):
            assert max(operation.get("sigma", [0])) <= 15
            assert min(operation.get("quality", [100])) >= 60
            assert min(operation.get("factor", [1])) >= 0.3


def test_light_is_a_web_video() -> None:
    blurred = 0
    for seed in range(200):
        operations = draw_operations(light(), (8, 64, 64, 3), seed)
        names = [operation["op"] for operation in operations]
        blurred += "blur" in names
        assert "sharpen" not in names and names.count("resize_to_target") == 1
        for operation in operations:
            assert max(operation.get("sigma", [0])) <= 5
            assert min(operation.get("quality", [100])) >= 75
            assert set(operation.get("factor", [1])) == {1}
    # half of 200, five standard deviations
    assert abs(blurred - 100) < 36


def test_bits_scale_with_the_pixels() -> None:
    small, large = (draw_operations(Recipe(), (2, side, side, 3), 3) for side in (256, 512))
    bits = [[op["bits_per_frame"] for op in ops if op["op"] == "codec"] for ops in (small, large)]
    np.testing.assert_allclose(np.array(bits[1]) / np.array(bits[0]), 4, rtol=1e-3)


@pytest.mark.parametrize("grey", [False, True])
def test_gaussian_noise_has_its_moments(grey: bool) -> None:
    flat = np.full((400, 400, 3), 128, np.uint8)
    noise = add_gaussian(flat, 12.0, grey, rng()).astype(np.float64) - 128
    # 160 000 values: the error of a mean is 12/400, that of a variance about sqrt(2)*144/400; five of each,
    # and 1/12 for rounding
    assert abs(noise[..., 0].mean()) < 0.15
    assert abs(noise[..., 0].var() - 144 - 1 / 12) < 2.6
    correlation = np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]
    assert correlation == pytest.approx(1) if grey else abs(correlation) < 0.02


@pytest.mark.parametrize("level", [3, 40, 128, 230])
def test_poisson_noise_is_basicsrs(level: int) -> None:
    """Against NumPy's Poisson sampler: V = 2 for a picture of two levels, 256 for one of all."""
    picture = np.full((400, 400, 3), level, np.uint8)
    picture[:2, :128] = np.arange(256, dtype=np.uint8).reshape(2, 128, 1)
    noise = add_poisson(picture, 1.7, False, rng())[2:].astype(np.float64) - level
    reference_rng = np.random.default_rng(1)
    exact = (reference_rng.poisson(level / 255 * 256, (398, 400, 3)) / 256 - level / 255) * 255 * 1.7
    reference = np.clip(np.rint(level + exact), 0, 255) - level
    assert abs(noise.mean() - reference.mean()) < 6 * reference.std() / np.sqrt(reference.size) + 0.05
    assert noise.std() == pytest.approx(reference.std(), rel=0.03)
    for probability in (0.05, 0.25, 0.75, 0.95):
        assert abs(np.quantile(noise, probability) - np.quantile(reference, probability)) <= 2


def test_black_stays_black_under_poisson_noise() -> None:
    assert not add_poisson(np.zeros((64, 64, 3), np.uint8), 3.0, False, rng()).any()


@pytest.mark.parametrize("kind", ["iso", "aniso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc"])
@pytest.mark.parametrize("size", [7, 21])
def test_separable_parts_give_the_kernels_result(hr: np.ndarray, kind: str, size: int) -> None:
    one = np.ones(1)
    kernel = (
        sinc_kernels(size, 1.3 * one)
        if kind == "sinc"
        else gaussian_kernels(kind, size, 2.5 * one, 0.6 * one, 0.7 * one, 1.4 * one)
    )[0]
    assert kernel.sum() == pytest.approx(1)
    exact = cv2.filter2D(hr[0].astype(np.float64), -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    # TOLERANCE bounds the error before rounding, the worst picture given; rounding adds a half
    limit = 255 * TOLERANCE * 1.3 + 0.51
    assert np.abs(apply_kernel(hr[0], kernel) - np.clip(exact, 0, 255)).max() <= limit


def test_sharpening_follows_its_formula(hr: np.ndarray) -> None:
    picture = hr[0].astype(np.float64) / 255
    blurred = cv2.GaussianBlur(picture, (51, 51), 0)
    mask = (np.abs(picture - blurred) * 255 > 10).astype(np.float64)
    fade = cv2.GaussianBlur(mask, (51, 51), 0)
    exact = (fade * np.clip(picture + 0.5 * (picture - blurred), 0, 1) + (1 - fade) * picture) * 255
    difference = np.abs(sharpen_frame(hr[0], 51, 0.5, 10.0) - exact)
    assert difference.mean() < 0.6  # rounding alone makes 0.25
    # the blurs are made at a quarter of the resolution, where the border's reflection falls elsewhere
    assert difference[26:-26, 26:-26].max() < 3


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_codecs_take_odd_sizes_and_sizes_that_change(codec: str) -> None:
    frames = [moving_picture(1, side, side + 3, 1)[0] for side in (37, 38, 36)]
    decoded = through_codec(frames, codec, 40_000, "superfast")
    assert [picture.shape for picture in decoded] == [(37, 40, 3)] * 3
    assert cv2.PSNR(decoded[0], frames[0]) > 20


def test_more_bits_mean_less_damage(hr: np.ndarray) -> None:
    clip = list(hr)
    psnr = [
        np.mean([cv2.PSNR(a, b) for a, b in zip(through_codec(clip, "libx264", bits, "superfast"), clip, strict=True)])
        for bits in (2_000, 20_000, 200_000)
    ]
    assert psnr[0] < psnr[1] < psnr[2]


def test_clip_members_are_lossless_and_repeatable(hr: np.ndarray) -> None:
    content = encode_bytes(hr)
    assert content == encode_bytes(hr)
    np.testing.assert_array_equal(decode_bytes(content), hr)


def test_bad_clips_and_names_are_refused() -> None:
    with pytest.raises(UserError, match="multiples of 4"):
        degrade_clip(np.zeros((1, 62, 64, 3), np.uint8), "mild", 0)
    with pytest.raises(UserError, match="unknown degradation preset"):
        degrade_clip(np.zeros((1, 64, 64, 3), np.uint8), "milde", 0)
    with pytest.raises(ValueError, match="unknown recipe 'milde'"):
        Mixture(weights={"milde": 1.0})


def test_the_command_degrades_a_video(tmp_path: Path) -> None:
    from common.lossless_clip import write_lossless

    video = moving_picture(12, 96, 128, 2)
    write_lossless(tmp_path / "in.mkv", video)
    command = ["-m", "datagen.degradation.degrade", tmp_path / "in.mkv", tmp_path / "out.mp4", "--preset", "mild"]
    command += ["--seed", 3, "--start", 2, "--frames", 5, "--crop", "64x96", "--hr-output", tmp_path / "hr.mp4"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    hr = video[2:7, 16:80, 16:112]
    np.testing.assert_array_equal(read_video(tmp_path / "hr.mp4"), hr)
    lr, draws = degrade_clip(hr, "mild", 3)
    np.testing.assert_array_equal(read_video(tmp_path / "out.mp4"), lr)
    assert json.loads((tmp_path / "out.json").read_text()) == draws
