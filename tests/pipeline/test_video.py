"""Video files in and out: what other people's videos do to a reader and a writer."""

import contextlib
import time
from fractions import Fraction

import av
import ffmpeg
import imageio_ffmpeg
import numpy as np
import pytest

from common.errors import UserError
from common.video_probe import ffmpeg_binary, probe
from common.video_reader import read_frames, read_video
from common.video_writer import VideoWriter
from pipeline.container import TrackPlan, join, write_output
from tests.interrupts import ends_within, interrupted


def make(path, *, size="48x32", seconds=0.5, audio=None, **options):
    """A test pattern with FFmpeg alone, without our writer."""
    streams = [ffmpeg.input(f"testsrc=size={size}:rate=24:duration={seconds}", f="lavfi")]
    if audio:
        streams.append(ffmpeg.input(f"sine=duration={seconds}", f="lavfi"))
        options["acodec"] = audio
    ffmpeg.output(*streams, str(path), loglevel="error", **options).run(cmd=ffmpeg_binary())
    return path


def write(path, frames, **options):
    height, width = frames.shape[1:3]
    with VideoWriter(path, width=width, height=height, frame_rate=Fraction(24), **options) as writer:
        writer.write(frames)
    return path


def gradient(count=3, height=32, width=48) -> np.ndarray:
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    return np.broadcast_to(ramp[None, None, :, None], (count, height, width, 3)).copy()


def test_a_part_is_that_part(tmp_path):
    path = make(tmp_path / "video.mp4")
    whole = read_video(path)
    assert len(whole) == 12 and np.array_equal(read_video(path, 3, 4), whole[3:7])


def test_lossy_file_keeps_colours(tmp_path):
    frames = gradient()
    error = np.abs(read_video(write(tmp_path / "x.mp4", frames)).astype(int) - frames)
    assert error.mean() < 3


def test_ten_bits_are_written(tmp_path):
    frames = np.tile(np.linspace(0, 1023, 48).astype(np.uint16)[None, None, :, None], (2, 32, 1, 3))
    path = write(tmp_path / "x.mkv", frames, bit_depth=10, crf=1)
    raw, _ = (
        ffmpeg.input(str(path))
        .output("pipe:", format="rawvideo", pix_fmt="gray10le", loglevel="error")
        .run(cmd=ffmpeg_binary(), capture_stdout=True)
    )
    luma = np.frombuffer(raw, np.uint16).reshape(2, 32, 48)
    assert len(np.unique(luma % 4)) == 4, "the two low bits are empty"


def test_a_video_recorded_on_its_side_comes_out_upright(tmp_path):
    flat = make(tmp_path / "flat.mp4")
    turned = tmp_path / "turned.mp4"
    source = ffmpeg.input(str(flat), display_rotation=90)
    ffmpeg.output(source, str(turned), c="copy", loglevel="error").run(cmd=ffmpeg_binary())
    assert (probe(turned).width, probe(turned).height) == (32, 48)
    upright = np.rot90(read_video(flat), axes=(1, 2))
    assert np.array_equal(read_video(turned), upright)


def test_pixels_that_are_not_square_stay_so(tmp_path):
    path = make(tmp_path / "dvd.mp4", vf="setsar=16/15")
    ratio = probe(path).sample_aspect_ratio
    assert ratio == Fraction(16, 15)
    assert probe(write(tmp_path / "x.mp4", gradient(), sample_aspect_ratio=ratio)).sample_aspect_ratio == ratio


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "m4v"])
def test_joined_parts_are_the_frames_one_after_the_other_at_their_rate(tmp_path, suffix):
    ramps = [np.roll(gradient(count), count, axis=2) for count in (7, 1, 5)]
    parts = [write(tmp_path / f"part-{index}.mp4", ramp) for index, ramp in enumerate(ramps)]
    between, joined = tmp_path / "joined.mp4", tmp_path / f"out.{suffix}"
    join(parts, between)
    write_output(between, joined, None, TrackPlan(), Fraction(0), Fraction(24))
    assert np.array_equal(read_video(joined), np.concatenate([read_video(part) for part in parts]))
    with av.open(str(joined)) as container:
        stream = container.streams.video[0]
        times = [frame.pts * stream.time_base for frame in container.decode(stream)]
    assert [round(float(time) * 24 - float(times[0]) * 24, 1) for time in times] == list(range(13))
    assert abs(times[0]) < Fraction(1, 1000)


def test_frames_are_estimated_where_the_header_does_not_count(tmp_path):
    """Sound that lasts longer does not count."""
    path = make(tmp_path / "x.mkv", seconds=2)
    longer = tmp_path / "longer.mkv"
    sound = ffmpeg.input("sine=duration=3", f="lavfi")
    ffmpeg.output(ffmpeg.input(str(path)), sound, str(longer), vcodec="copy", loglevel="error").run(cmd=ffmpeg_binary())
    assert probe(longer).duration_s == pytest.approx(3, abs=0.1)
    for info in map(probe, (path, longer)):
        assert info.frames is None and info.estimated_frames == 48


def test_a_file_that_breaks_off_is_refused(tmp_path):
    path = make(tmp_path / "whole.mp4", seconds=4, movflags="faststart", g=6)
    half = tmp_path / "half.mp4"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"half\.mp4 breaks off after \d+ frames"):
        list(read_frames(half))


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "song.m4a"
    ffmpeg.input("sine=duration=0.2", f="lavfi").output(str(path), loglevel="error").run(cmd=ffmpeg_binary())
    with pytest.raises(UserError, match="no video stream"):
        probe(path)


def test_an_error_while_writing_leaves_neither_file(tmp_path):
    with (
        pytest.raises(RuntimeError),
        VideoWriter(tmp_path / "x.mp4", width=48, height=32, frame_rate=Fraction(24)) as writer,
    ):
        writer.write(gradient())
        raise RuntimeError
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "x.nonsense", gradient())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_at_any_moment_ends_the_writer(tmp_path):
    """The thread that waits for FFmpeg is idle when a clip comes: the interrupt must not leave it so."""
    line, reached = 0, True
    with ends_within(60):
        while reached:
            with (
                contextlib.suppress(KeyboardInterrupt),
                VideoWriter(tmp_path / "x.mkv", width=48, height=32, frame_rate=Fraction(24)) as writer,
            ):
                writer.write(gradient(1))
                time.sleep(0.02)
                reached = interrupted(line, lambda writer=writer: writer.write(gradient(1)))
                raise KeyboardInterrupt
            line += 1
    assert line > 3 and list(tmp_path.iterdir()) == []


def test_the_bundled_ffmpeg_is_used_unless_another_is_chosen(tmp_path, monkeypatch):
    other = tmp_path / "ffmpeg"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert ffmpeg_binary() == imageio_ffmpeg.get_ffmpeg_exe()
    monkeypatch.setenv("DUO_VSR_FFMPEG", str(other))
    assert ffmpeg_binary() == str(other)
    monkeypatch.setenv("DUO_VSR_FFMPEG", "no-such-program")
    with pytest.raises(UserError, match="DUO_VSR_FFMPEG=no-such-program: no such program; unset it"):
        ffmpeg_binary()
