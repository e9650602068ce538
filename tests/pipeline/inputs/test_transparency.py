"""Transparency is kept where the output can hold it: enlarged frame by frame, beside colours as without it."""

import subprocess

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from common.video_probe import ffmpeg_binary
from pipeline.model.vae import to_frames, upsample_low_resolution
from tests.pipeline.inputs.conftest import picture


def enlarged(pixels: np.ndarray, bits: int = 8) -> np.ndarray:
    """What --bicubic makes of an image (h, w, C)."""
    return to_frames(upsample_low_resolution(pixels[None]), bits)[0].numpy()


def smooth(seed: int, channels: int) -> np.ndarray:
    """uint8 (24, 32, C)."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    return cv2.resize(small, (32, 24), interpolation=cv2.INTER_LINEAR)


def frames_of(path) -> list[np.ndarray]:
    """RGBA of 16 bits by FFmpeg alone."""
    with av.open(str(path)) as container:
        width, height = container.streams.video[0].width, container.streams.video[0].height
    command = [ffmpeg_binary(), "-v", "error", "-i", str(path), "-pix_fmt", "rgba64le", "-f", "rawvideo", "-"]
    raw = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return list(np.frombuffer(raw, np.uint16).reshape(-1, height, width, 4))


@pytest.fixture
def prores(make):
    """10 frames of 64x48: a ramp of transparency from left to right that grows with time."""
    ramp = "geq=lum='lum(X,Y)':cb='cb(X,Y)':cr='cr(X,Y)':a='X*8+N*40'"
    return make(
        "in.mov", *picture(0.4), "-vf", f"format=yuva444p10le,{ramp}", "-c:v", "prores_ks", "-profile:v", "4444"
    )


def test_prores_keeps_it_in_parts(prores, upscale, tmp_path):
    """Each frame has its own, on both sides of a part's border and after a resumption."""
    output = tmp_path / "out.mov"
    options = ("--bicubic", "--encoder", "prores", "--part-frames", 4)
    done = upscale(prores, output, *options)
    assert done.returncode == 0 and "its transparency is kept" in done.stderr, done.stderr
    with av.open(str(output)) as container:
        assert container.streams.video[0].pix_fmt.startswith("yuva444p")
    before, after = frames_of(prores), frames_of(output)
    assert len(before) == len(after) == 10
    for source, result in zip(before, after, strict=True):
        wanted = enlarged(source[..., 3:], 16)[..., 0].astype(float)
        assert np.abs(result[..., 3] - wanted).max() < 2 * 65535 / 1023
    opaque = tmp_path / "opaque.mov"
    plain = [ffmpeg_binary(), "-v", "error", "-i", str(prores), "-pix_fmt", "yuv444p10le", "-c:v", "prores_ks"]
    subprocess.run([*plain, "-profile:v", "4444", str(opaque)], check=True)
    assert upscale(opaque, tmp_path / "plain.mov", "--bicubic", "--encoder", "prores").returncode == 0
    colours = np.stack(frames_of(tmp_path / "plain.mov"))[..., :3].astype(float) - np.stack(after)[..., :3]
    assert np.abs(colours).mean() < 0.02 * 65535, "what is transparent has its colour"


def test_a_model_leaves_it_as_it_is_and_a_resumed_job_too(prores, upscale, model_folder, tmp_path, monkeypatch):
    options = ("--model", model_folder, "--window", 5, "--overlap", 1, "--part-frames", 3, "--encoder", "prores")
    assert upscale(prores, tmp_path / "whole.mov", *options).returncode == 0

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    output = tmp_path / "out.mov"
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.upscale.finish", interrupted)
        assert upscale(prores, output, *options).returncode == 130
    for path in sorted((tmp_path / ".out.mov.parts").glob("part-*"))[2:]:
        path.unlink()
    done = upscale(prores, output, *options)
    assert done.returncode == 0 and "resuming after" in done.stderr
    whole, result = np.stack(frames_of(tmp_path / "whole.mov")), np.stack(frames_of(output))
    assert np.array_equal(whole, result)
    for source, alpha in zip(frames_of(prores), result[..., 3], strict=True):
        assert np.abs(alpha - enlarged(source[..., 3:], 16)[..., 0].astype(float)).max() < 2 * 65535 / 1023


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("deep", [False, True], ids=["8 bits", "16 bits"])
def test_images_keep_it(upscale, tmp_path, suffix, deep):
    pixels = smooth(0, 4)
    pixels = pixels.astype(np.uint16) * 251 if deep else pixels
    source, output = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    cv2.imwrite(str(source), cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA))
    done = upscale(source, output, "--bicubic")
    assert done.returncode == 0 and "its transparency is kept" in done.stderr
    if deep:
        result = cv2.cvtColor(cv2.imread(str(output), cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA)
    else:  # of 8 bits, OpenCV multiplies a TIFF's colours by its transparency
        result = np.asarray(Image.open(output))
    assert result.dtype == pixels.dtype and np.array_equal(result, enlarged(pixels, 16 if deep else 8))


def test_palettes_animations_and_sequences_keep_it(upscale, tmp_path):
    frames = [Image.fromarray(smooth(number, 4)) for number in range(3)]
    frames[0].save(
        tmp_path / "in.webp", save_all=True, append_images=frames[1:], duration=40, lossless=True, exact=True
    )
    assert upscale(tmp_path / "in.webp", tmp_path / "f%d.png", "--bicubic").returncode == 0
    for number, frame in enumerate(frames, 1):
        with Image.open(tmp_path / f"f{number}.png") as image:
            assert np.array_equal(np.asarray(image), enlarged(np.asarray(frame))), number
    palette = Image.new("P", (8, 6), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=bytes([0, 90]))
    assert upscale(tmp_path / "p.png", tmp_path / "q.png", "--bicubic").returncode == 0
    with Image.open(tmp_path / "q.png") as image:
        assert image.mode == "RGBA" and set(image.getdata()) == {(255, 0, 0, 90)}
