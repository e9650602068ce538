"""Stills and sequences, in and out: order, depth, names, times, and what is refused or said."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from common.image_files import files_of_pattern, natural_order
from common.video_probe import probe
from common.video_reader import read_video
from pipeline.model.vae import to_frames, upsample_low_resolution
from tests.pipeline.inputs.conftest import frame_times, picture


def noise(seed: int, *, deep: bool = False) -> np.ndarray:
    """(24, 32, 3) RGB, smooth; uint16 if deep."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    large = cv2.resize(small, (32, 24), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(small.astype(np.uint16) * 251, (32, 24)) if deep else large


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels[..., ::-1])
    return path


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)[..., ::-1]


def enlarged(pixels: np.ndarray, bits: int = 8) -> np.ndarray:
    """What --bicubic makes of an image."""
    return to_frames(upsample_low_resolution(pixels[None]), bits)[0].numpy()


@pytest.fixture
def sequence(tmp_path):
    """11 images, numbered without padding."""
    for number in range(1, 12):
        write(tmp_path / "in" / f"f{number}.png", noise(number))
    return tmp_path / "in"


def test_a_folder_of_images_is_one_sequence_and_keeps_its_names(sequence, upscale, tmp_path):
    done = upscale(sequence, tmp_path / "out", "--bicubic")
    assert done.returncode == 0, done.stderr
    assert "11 images, f1.png to f11.png, are one sequence at 25 frames/s" in done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(sequence))
    for number in (2, 10):
        assert np.array_equal(read(tmp_path / "out" / f"f{number}.png"), enlarged(noise(number))), number
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_sequence_becomes_a_video_and_a_video_a_sequence(sequence, upscale, tmp_path):
    video = tmp_path / "out.mp4"
    assert upscale(sequence / "f%d.png", video, "--bicubic", "--fps", 10, "--scale", 1).returncode == 0
    assert np.allclose(frame_times(video), np.arange(11) / 10, atol=1e-4)
    done = upscale(video, tmp_path / "frames" / "%04d.tif", "--bicubic", "--scale", 1)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "frames")) == [f"{number:04d}.tif" for number in range(1, 12)]
    second = read(tmp_path / "frames" / "0002.tif").astype(int)
    assert np.abs(second - noise(2)).mean() < 8 < np.abs(second - noise(10)).mean(), "2 comes before 10"


def test_numbers_may_be_missing_and_begin_anywhere(sequence, upscale, tmp_path):
    (sequence / "f1.png").unlink()
    (sequence / "f5.png").unlink()
    (sequence / "f007.png").write_bytes(b"not of this pattern")
    done = upscale(sequence / "f%d.png", tmp_path / "out" / "g%02d.png", "--bicubic", "--start", 2, "--frames", 3)
    assert done.returncode == 0 and "1 numbers between the first and the last are missing" in done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["g01.png", "g02.png", "g03.png"]
    assert np.array_equal(read(tmp_path / "out" / "g02.png"), enlarged(noise(6))), "2, 3, 4, 6, …"
    assert [number for number, _ in files_of_pattern(sequence / "f%03d.png")] == [7, 10, 11][:1]
    assert sorted(map(Path, ("a10", "a9", "a09")), key=natural_order) == [Path("a09"), Path("a9"), Path("a10")]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_stay_sixteen(upscale, tmp_path, suffix):
    source = write(tmp_path / f"in.{suffix}", noise(0, deep=True))
    output = tmp_path / f"out.{suffix}"
    assert upscale(source, output, "--bicubic").returncode == 0
    result = read(output)
    assert result.dtype == np.uint16 and np.array_equal(result, enlarged(noise(0, deep=True), 16))
    done = upscale(source, tmp_path / "8.png", "--bicubic", "--bit-depth", 8)
    assert done.returncode == 0 and "16 bits become 8; --bit-depth 16 keeps them" in done.stderr
    assert read(tmp_path / "8.png").dtype == np.uint8


def test_a_model_writes_sixteen_bits(upscale, model_folder, tmp_path):
    source = write(tmp_path / "in.png", noise(0))
    options = ("--model", model_folder)
    assert upscale(source, tmp_path / "16.png", *options, "--bit-depth", 16).returncode == 0
    assert upscale(source, tmp_path / "8.png", *options).returncode == 0
    deep, plain = read(tmp_path / "16.png"), read(tmp_path / "8.png")
    assert deep.dtype == np.uint16 and len(np.unique(deep % 257)) > 200, "not 8 bits made wide"
    assert np.abs(deep / 257 - plain).max() <= 0.51


def test_a_jpeg_is_right_in_colour_and_upright(upscale, tmp_path):
    flat = Image.new("RGB", (32, 24), (32, 192, 64))
    exif = flat.getexif()
    exif[0x0112] = 6
    flat.save(tmp_path / "in.jpg", quality=98, exif=exif)
    assert upscale(tmp_path / "in.jpg", tmp_path / "out.jpg", "--bicubic").returncode == 0
    result = np.asarray(Image.open(tmp_path / "out.jpg"))
    assert result.shape == (128, 96, 3) and np.abs(result.reshape(-1, 3) - (32.0, 192, 64)).max() <= 2


def test_an_animated_webp_keeps_its_times(upscale, tmp_path):
    levels, durations = (10, 120, 230), (40, 200, 80)
    frames = [Image.new("RGB", (32, 24), (level,) * 3) for level in levels]
    source = tmp_path / "in.webp"
    frames[0].save(source, save_all=True, append_images=frames[1:], duration=durations, lossless=True)
    output = tmp_path / "out.mp4"
    assert upscale(source, output, "--bicubic").returncode == 0
    assert np.allclose(frame_times(output), (0, 0.04, 0.24), atol=0.001)
    assert abs(probe(output).duration_s - 0.32) < 0.02
    assert np.abs(read_video(output).mean((1, 2, 3)) - levels).max() < 2
    assert upscale(source, tmp_path / "cfr.mp4", "--bicubic", "--fps", 25).returncode == 0
    shown = read_video(tmp_path / "cfr.mp4").mean((1, 2, 3))
    assert np.abs(shown - (10, *(120,) * 5, 230, 230)).max() < 2
    assert upscale(source, tmp_path / "stills", "--bicubic").returncode == 0
    assert sorted(os.listdir(tmp_path / "stills")) == ["in_00001.png", "in_00002.png", "in_00003.png"]


def test_stills_are_upscaled_one_by_one_when_asked(sequence, upscale, tmp_path):
    write(sequence / "wide.png", np.zeros((8, 40, 3), np.uint8))
    done = upscale(sequence, tmp_path / "out", "--bicubic")
    assert done.returncode == 2 and "wide.png has 40x8 pixels" in done.stderr and "--stills" in done.stderr
    done = upscale(sequence, tmp_path / "out", "--bicubic", "--stills")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out" / "wide.png").shape == (32, 160, 3)
    assert np.array_equal(read(tmp_path / "out" / "f3.png"), enlarged(noise(3)))


def test_images_beside_videos_are_left_alone_and_said(base, upscale, tmp_path):
    folder = tmp_path / "videos"
    write(folder / "cover.png", noise(0))
    shutil.copy(base, folder / "a.mp4")
    done = upscale(folder, tmp_path / "out", "--bicubic", "--frames", 2)
    assert done.returncode == 0 and "1 images beside the videos are left alone" in done.stderr
    assert os.listdir(tmp_path / "out") == ["a.mp4"]


def test_what_an_image_cannot_hold_is_said(make, upscale, tmp_path):
    make("alpha.png", *picture(0.04, "32x24"), "-vf", "format=rgba,colorchannelmixer=aa=0.5", "-frames:v", "1")
    done = upscale(tmp_path / "alpha.png", tmp_path / "out.jpg", "--bicubic")
    assert done.returncode == 0 and "its transparency is left out; " in done.stderr
    with Image.open(tmp_path / "alpha.png") as image:
        image.convert("RGB").save(tmp_path / "p3.png", icc_profile=b"any profile")
    done = upscale(tmp_path / "p3.png", tmp_path / "out2.png", "--bicubic")
    assert done.returncode == 0 and "its colour profile is left out" in done.stderr


def test_a_damaged_image_is_reported_and_its_place_kept(sequence, upscale, tmp_path):
    content = (sequence / "f4.png").read_bytes()
    (sequence / "f4.png").write_bytes(content[: len(content) // 2])
    done = upscale(sequence, tmp_path / "out", "--bicubic")
    assert done.returncode == 3 and "f4.png is damaged" in done.stderr
    assert np.array_equal(read(tmp_path / "out" / "f4.png"), enlarged(noise(3))), "the one before"
    assert np.array_equal(read(tmp_path / "out" / "f5.png"), enlarged(noise(5)))
    done = upscale(sequence, tmp_path / "stopped", "--bicubic", "--on-error", "stop")
    assert done.returncode == 2 and not (tmp_path / "stopped").exists()


def test_images_that_are_refused(sequence, base, upscale, tmp_path):
    (tmp_path / "scene.exr").write_bytes(b"v/1\x01")
    (tmp_path / "text.png").write_text("no image")
    mixed = tmp_path / "mixed"
    write(mixed / "a.png", noise(0))
    write(mixed / "b.jpg", noise(1))
    before = {path.name: path.read_bytes() for path in sequence.iterdir()}
    for source, output, options, words in (
        (sequence, sequence, (), "it is the input"),
        (sequence, sequence / "f%d.png", ("--overwrite",), "it is the input"),
        (sequence, tmp_path / "one.png", (), "one_%05d.png, or give --frames 1"),
        (base, tmp_path / "one.png", (), "one image holds one frame"),
        (sequence / "g%d.png", tmp_path / "out.mp4", (), "no image is named like"),
        (sequence / "g.png", tmp_path / "out.mp4", (), "no image "),
        (tmp_path / "scene.exr", tmp_path / "out.png", (), "scene.exr is no EXR that FFmpeg decodes"),
        (tmp_path / "text.png", tmp_path / "out.png", (), "text.png cannot be read"),
        (mixed, tmp_path / "out", (), ".jpg, .png images: one sequence has one kind"),
        (sequence, tmp_path / "%d.jpg", ("--bit-depth", 16), "jpeg has 8 bits"),
        (sequence, tmp_path / "out.mp4", ("--bit-depth", 16), "h264 has 8 or 10 bits"),
        (sequence, tmp_path / "%d.png", ("--crf", 3), "--crf means nothing to png"),
        (sequence, tmp_path / "out.bmp", (), "choose one of .mp4"),
        (base, tmp_path / "out.mp4", ("--stills",), "for a folder of images"),
    ):
        done = upscale(source, output, "--bicubic", *options)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1], (words, done.stderr)
    assert {path.name: path.read_bytes() for path in sequence.iterdir()} == before


def test_existing_images_are_kept_and_a_killed_naming_goes_on(sequence, upscale, tmp_path, monkeypatch):
    output = tmp_path / "out"
    write(output / "f3.png", noise(99))
    done = upscale(sequence, output, "--bicubic")
    assert done.returncode == 2 and "f3.png exists" in done.stderr
    (output / "f3.png").unlink()
    written, real = [], __import__("common.atomic").atomic.write_atomic

    def killed(path, content):
        written.append(path)
        if path.name == "f5.png":
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.finish_output.write_atomic", killed)
        assert upscale(sequence, output, "--bicubic").returncode == 130
    assert sorted(os.listdir(output)) == ["f1.png", "f2.png", "f3.png", "f4.png"]
    done = upscale(sequence, output, "--bicubic")
    assert done.returncode == 0 and "resuming after 11 frames" in done.stderr
    assert len(os.listdir(output)) == 11 and sorted(os.listdir(tmp_path)) == ["in", "out"]
