"""y4m on standard input and output, as `ffmpeg … | python -m pipeline.upscale - - | ffmpeg …`."""

import os
import subprocess
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from common.piped_video import PipedVideo
from common.video_probe import ffmpeg_binary, probe
from common.video_reader import EXACT, read_video
from tests.commands import start
from tests.pipeline.inputs.conftest import frame_times, picture


@pytest.fixture
def y4m(make):
    """12 frames of 64x48 at 24000/1001 frames/s."""
    return make("in.y4m", *picture(0.5, rate="24000/1001"), "-pix_fmt", "yuv420p")


def from_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input of this process is the file."""
    descriptor = os.open(path, os.O_RDONLY)
    monkeypatch.setattr("pipeline.upscale_source.PipedVideo", lambda: PipedVideo(descriptor))


def test_a_pipe_gives_the_frames_that_a_file_gives(y4m, upscale, model_folder, tmp_path):
    """Standard output holds the video alone; FFmpeg reads it as it comes."""
    options = ("--model", model_folder, "--window", 5, "--overlap", 1)
    piped = tmp_path / "piped.y4m"
    line = ["-m", "pipeline.upscale", "-", "-", *options]
    with y4m.open("rb") as source, piped.open("wb") as sink:
        feeding = subprocess.Popen(["cat"], stdin=source, stdout=subprocess.PIPE)
        draining = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=sink)
        assert feeding.stdout is not None and draining.stdin is not None
        with feeding.stdout, draining.stdin:
            command = start(*line, stdin=feeding.stdout.fileno(), stdout=draining.stdin.fileno())
        _, errors = command.communicate(timeout=300)
        assert (command.returncode, feeding.wait(60), draining.wait(60)) == (0, 0, 0), errors
    content = piped.read_bytes()
    assert content.startswith(b"YUV4MPEG2 W256 H192 F24000:1001 ")
    assert "-: 12 frames of 256x192" in errors
    assert len(content) == content.index(b"\n") + 1 + 12 * (len(b"FRAME\n") + 256 * 192 * 3 // 2)
    output = tmp_path / "file.mkv"
    assert upscale(y4m, output, *options, "--lossless").returncode == 0
    luma = np.array([0.299, 0.587, 0.114])
    exact, result = read_video(output) @ luma, read_video(piped) @ luma
    assert result.shape == exact.shape and np.abs(exact - result).mean() < 2, "chroma has half the size"


def test_a_pipe_into_a_file(y4m, upscale, tmp_path, monkeypatch):
    output = tmp_path / "out.mp4"
    from_file(y4m, monkeypatch)
    assert upscale("-", output, "--bicubic").returncode == 0
    info = probe(output)
    assert (info.width, info.height, info.frame_rate, info.frames) == (256, 192, Fraction(24000, 1001), 12)
    assert np.allclose(frame_times(output), np.arange(12) * 1001 / 24000, atol=1e-4)
    from_file(y4m, monkeypatch)
    assert upscale("-", tmp_path / "f_%d.png", "--bicubic", "--start", 3, "--frames", 2).returncode == 0
    assert sorted(path.name for path in tmp_path.glob("f_*")) == ["f_1.png", "f_2.png"]


def test_half_a_frame_is_damage_and_nothing_is_left_to_resume(y4m, upscale, tmp_path, monkeypatch):
    half = tmp_path / "half.y4m"
    half.write_bytes(y4m.read_bytes()[:-2000])
    from_file(half, monkeypatch)
    done = upscale("-", tmp_path / "out.mp4", "--bicubic", "--part-frames", 1)
    assert done.returncode == 3 and "warning: -: damaged" in done.stderr
    from_file(half, monkeypatch)
    done = upscale("-", tmp_path / "stopped.mp4", "--bicubic", "--part-frames", 1, "--on-error", "stop")
    assert done.returncode == 2 and sorted(path.name for path in tmp_path.iterdir()) == [
        "half.y4m", "in.y4m", "out.mp4",
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"RIFF1234AVI \n", b"YUV4MPEG2 W64 F25:1\n", bytes(5000)])
def test_other_pipes_are_one_line(upscale, tmp_path, monkeypatch, content):
    (tmp_path / "in").write_bytes(content)
    from_file(tmp_path / "in", monkeypatch)
    done = upscale("-", tmp_path / "out.mp4", "--bicubic")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "standard input holds no y4m video" in done.stderr and "-f yuv4mpegpipe -" in done.stderr


def test_a_reader_that_stops_reading_is_one_line(y4m, tmp_path):
    """As `… | head`: no traceback, and no process waits for ever."""
    reading, writing = os.pipe()
    process = start("-m", "pipeline.upscale", y4m, "-", "--bicubic", "--size", "1024x768", stdout=writing)
    os.close(writing)
    with open(reading, "rb") as stdout:
        assert stdout.read(9) == b"YUV4MPEG2"
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2
    assert lines[-1] == "error: cannot write -: what reads it has stopped"
    assert not any("Traceback" in line for line in lines)


def test_headers_say_size_rate_depth_and_fields(tmp_path):
    for text, values in (
        (b"YUV4MPEG2 W720 H576 F25:1 It A16:15 C420mpeg2\n", (720, 576, 25, True, Fraction(16, 15), 8, False)),
        (b"YUV4MPEG2 W8 H6 F24000:1001 Ip A0:0 C422p10\n", (8, 6, Fraction(24000, 1001), False, 1, 10, False)),
        (b"YUV4MPEG2 H6 W8 C444alpha\n", (8, 6, 25, False, 1, 8, True)),
    ):  # fmt: skip
        path = tmp_path / "header"
        path.write_bytes(text)
        with path.open("rb") as file:
            info = PipedVideo(file.fileno()).info
        assert (
            info.width, info.height, info.frame_rate, info.interlaced, info.sample_aspect_ratio, info.bits, info.alpha,
        ) == values  # fmt: skip


def test_colours_of_a_pipe_are_read_as_they_are_written(make, upscale, tmp_path, monkeypatch):
    """y4m has no tags: BT.601 below high definition, BT.709 from there on, both ways."""
    flat = make("flat.png", "-f", "lavfi", "-i", "color=0x20C040:s=64x48", "-frames:v", "1")
    for size, matrix in (("256x192", "bt601"), ("1280x720", "bt709")):
        written = tmp_path / f"{size}.y4m"
        with written.open("wb") as file:
            pipe = nullcontext(file.fileno())
            monkeypatch.setattr("pipeline.upscale.only_video_on_stdout", lambda pipe=pipe: pipe)
            assert upscale(flat, "-", "--bicubic", "--size", size).returncode == 0
        filters = f"scale=in_color_matrix={matrix}:flags=bicubic+{EXACT},format=rgb24"
        decode = [ffmpeg_binary(), "-v", "error", "-i", str(written), "-vf", filters, "-f", "rawvideo", "-"]
        pixels = np.frombuffer(subprocess.run(decode, capture_output=True, check=True).stdout, np.uint8)
        assert np.abs(pixels.reshape(-1, 3) - (32.0, 192, 64)).max() <= 2, size
        assert np.abs(read_video(written).reshape(-1, 3) - (32.0, 192, 64)).max() <= 2, size
