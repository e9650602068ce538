"""EXR in and out: linear light through the sRGB curve, both ways, and what is clipped or left out."""

import os
import subprocess

import av
import cv2
import imageio_ffmpeg
import numpy as np
import pytest

from pipeline.model.vae import to_frames, upsample_low_resolution


def light(seed: int = 0, channels: int = 3, largest: float = 1.0) -> np.ndarray:
    """float32 (24, 32, C), smooth."""
    small = np.random.default_rng(seed).random((6, 8, channels), np.float32) * largest
    return cv2.resize(small, (32, 24), interpolation=cv2.INTER_LINEAR)


def write(path, pixels: np.ndarray, kind: str = "float"):
    """By the bundled FFmpeg, whose EXR holds what it is given."""
    path.parent.mkdir(exist_ok=True)
    planes = [1, 2, 0, 3][: pixels.shape[2]]  # GBR
    form = "gbrpf32le" if pixels.shape[2] == 3 else "gbrapf32le"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", form]
    command += ["-s", f"{pixels.shape[1]}x{pixels.shape[0]}", "-i", "-", "-c:v", "exr", "-format", kind, str(path)]
    subprocess.run(command, input=np.ascontiguousarray(pixels.transpose(2, 0, 1)[planes]).tobytes(), check=True)
    return path


def read(path) -> np.ndarray:
    """Linear light, float32 (H, W, 3)."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert frame.format.name.startswith("gbrpf16")
    return frame.reformat(format="gbrpf32le").to_ndarray()


def shown(linear: np.ndarray) -> np.ndarray:
    """The sRGB curve, float64 in [0, 1]."""
    linear = np.clip(linear.astype(float), 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def undone(pixels: np.ndarray) -> np.ndarray:
    return np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)


def enlarged(linear: np.ndarray) -> np.ndarray:
    """What --bicubic makes of an image, as pixels in [0, 1]."""
    pixels = np.rint(shown(linear) * 65535).astype(np.uint16)
    return to_frames(upsample_low_resolution(pixels[None]), 16)[0].numpy() / 65535


@pytest.mark.parametrize("kind", ["half", "float"])
def test_light_comes_out_as_it_went_in(upscale, tmp_path, kind):
    """×4 it is what bicubic makes of the pixels that a display shows."""
    source, output = write(tmp_path / "in.exr", light(), kind), tmp_path / "out.exr"
    done = upscale(source, output, "--bicubic")
    assert done.returncode == 0, done.stderr
    assert "in.exr: EXR: linear light is seen through the sRGB curve" in done.stderr and "clipped" in done.stderr
    assert np.abs(read(output) - undone(enlarged(light()))).max() < 2e-3


def test_light_outside_a_display_is_clipped(upscale, tmp_path):
    pixels = light(largest=4.0) - 0.5
    source = write(tmp_path / "in.exr", pixels)
    assert upscale(source, tmp_path / "out.png", "--bicubic").returncode == 0
    result = cv2.imread(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert result.dtype == np.uint16 and np.abs(result / 65535 - enlarged(pixels)).max() < 1e-4
    assert result.min() == 0 and result.max() == 65535


def test_a_sequence_keeps_its_names_and_a_video_becomes_one(upscale, model_folder, make, tmp_path):
    for number in range(1, 4):
        write(tmp_path / "in" / f"s{number}.exr", light(number))
    assert upscale(tmp_path / "in", tmp_path / "out", "--bicubic").returncode == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["s1.exr", "s2.exr", "s3.exr"]
    assert np.abs(read(tmp_path / "out" / "s2.exr") - undone(enlarged(light(2)))).max() < 2e-3
    done = upscale(tmp_path / "in", tmp_path / "model" / "%d.exr", "--model", model_folder)
    assert done.returncode == 0 and read(tmp_path / "model" / "3.exr").shape == (96, 128, 3)
    flat = make("flat.mkv", "-f", "lavfi", "-i", "color=0x20C040:s=64x48:d=0.08,format=gbrp", "-c:v", "ffv1")
    done = upscale(flat, tmp_path / "flat_%d.exr", "--bicubic")
    assert done.returncode == 0 and "pixels become linear light by the sRGB curve" in done.stderr
    wanted = undone(np.array([0x20, 0xC0, 0x40]) / 255)
    assert np.abs(read(tmp_path / "flat_2.exr") - wanted).max() < 1e-3


def test_transparency_is_said_to_be_left_out(upscale, tmp_path):
    """Colours are those in the file, which are multiplied by it."""
    source = write(tmp_path / "in.exr", light(channels=4))
    with av.open(str(source)) as container:
        held = next(container.decode(video=0)).reformat(format="gbrapf32le").to_ndarray()
    done = upscale(source, tmp_path / "out.exr", "--bicubic")
    assert done.returncode == 0 and "its transparency is left out" in done.stderr
    assert np.abs(read(tmp_path / "out.exr") - undone(enlarged(held[..., :3]))).max() < 2e-3
    assert held[..., 3].min() < 0.2


def test_what_exr_does_not_hold_is_one_line(make, upscale, tmp_path):
    source = write(tmp_path / "in.exr", light())
    tags = "format=yuv420p10le,setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc=smpte2084:range=tv"
    hdr = make("hdr.mkv", "-f", "lavfi", "-i", "testsrc2=s=64x48:d=0.08", "-vf", tags, "-c:v", "ffv1")
    half = tmp_path / "half.exr"
    half.write_bytes(source.read_bytes()[:400])
    for given, options, words in (
        (source, ("--bit-depth", 8), "exr has 16 bits"),
        (hdr, (), "PQ or HLG is not undone"),
        (half, (), "half.exr is no EXR that FFmpeg decodes, or damaged"),
    ):
        done = upscale(given, tmp_path / "out" / "%d.exr", "--bicubic", *options)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr
