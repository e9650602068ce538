"""Damaged files, wrong options, odd names: nothing is lost in silence, and nothing fails at the last step."""

import json
import os
import shutil
from fractions import Fraction

import av
import pytest
import torch

from common.errors import UserError
from common.video_probe import probe
from common.video_reader import read_video
from pipeline import finish_output
from tests.pipeline.inputs.conftest import frame_times, picture, tracks


@pytest.fixture
def damaged(make, tmp_path):
    """One packet of 100 zeroed."""
    whole = make("d0.mp4", *picture(4), "-c:v", "libx264", "-g", "25", "-bf", "0")
    packets = [(packet.pos, packet.size) for packet in av.open(str(whole)).demux(video=0) if packet.pos]
    content = bytearray(whole.read_bytes())
    place, size = packets[50]
    content[place : place + size] = bytes(size)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    return path


def test_a_damaged_packet(damaged, upscale, tmp_path):
    output = tmp_path / "out.mp4"
    done = upscale(damaged, output, "--bicubic")
    times = frame_times(output)
    lost = f"damaged.mp4: damaged, {100 - len(times)} of 100 frames are lost, "
    assert done.returncode == 3 and (lost in done.stderr or len(times) == 100)
    assert 70 <= len(times) <= 100 and abs(times[-1] - 3.96) < 0.02, "what follows the damage keeps its time"
    assert upscale(damaged, output, "--bicubic", "--on-error", "keep", "--overwrite").returncode == 0
    stopped = tmp_path / "stopped.mp4"
    done = upscale(damaged, stopped, "--bicubic", "--on-error", "stop")
    assert done.returncode == 2 and "--on-error keep goes on" in done.stderr and not stopped.exists()


def test_damage_in_copied_sound_is_reported(base, upscale, tmp_path):
    packets = [(packet.pos, packet.size) for packet in av.open(str(base)).demux(audio=0) if packet.pos]
    content = bytearray(base.read_bytes())
    place, size = packets[len(packets) // 2]
    content[place : place + size] = b"\xff" * size
    source, output = tmp_path / "sound.mp4", tmp_path / "out.mp4"
    source.write_bytes(content)
    done = upscale(source, output, "--bicubic")
    assert done.returncode == 3 and "warning: " in done.stderr and "sound of track 1 is damaged" in done.stderr
    assert len(read_video(output)) == 50
    done = upscale(source, tmp_path / "stopped.mp4", "--bicubic", "--on-error", "stop")
    assert done.returncode == 2 and "sound of track 1" in done.stderr and not (tmp_path / "stopped.mp4").exists()


def test_the_disk_holds_two_copies_at_most_and_no_empty_folder(base, upscale, tmp_path, monkeypatch):
    """Parts go when the joined video is complete, and a run that is killed after that goes on from it."""
    output = tmp_path / "new" / "folder" / "out.mp4"

    def full(*_, **__):
        raise UserError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.finish_output.rehearse", full)
        patched.setattr("pipeline.upscale.rehearse", full)
        assert upscale(base, output, "--bicubic").returncode == 2
    assert not (tmp_path / "new").exists()
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.finish_output.times_restart", full)
        assert upscale(base, output, "--bicubic", "--part-frames", 20).returncode == 2
    parts = output.with_name(".out.mp4.parts")
    assert len(list(parts.glob("part-*.mp4"))) == 3
    real = finish_output.write_output

    def after_joining(joined, named, *values, **options):
        assert joined.exists() and not list(parts.glob("part-*.mp4"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.finish_output.write_output", after_joining)
        assert upscale(base, output, "--bicubic", "--part-frames", 20).returncode == 130
    assert finish_output.write_output is real
    done = upscale(base, output, "--bicubic", "--part-frames", 20)
    assert done.returncode == 0 and "resuming after 50 frames" in done.stderr
    assert len(read_video(output)) == 50 and os.listdir(output.parent) == ["out.mp4"]
    assert upscale(base, tmp_path / "whole.mp4", "--bicubic", "--part-frames", 20).returncode == 0
    assert output.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_half_a_file(make, upscale, tmp_path):
    whole = make("full.mkv", *picture(8), "-c:v", "libx264", "-g", "25")
    half = tmp_path / "half.mkv"
    half.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.55)])
    output = tmp_path / "out.mp4"
    done = upscale(half, output, "--bicubic")
    assert done.returncode == 3 and "frames earlier than its header says" in done.stderr
    assert 0 < probe(output).frames < 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--frames", 0), "--frames 0: it must be at least 1"),
        (("--steps", 0), "--steps 0: it must be 1 to 1000"),
        (("--start", -5), "--start -5: it must be at least 0"),
        (("--device", "tpu"), "--device tpu: choose cpu, cuda"),
        (("--crf", -1), "--crf -1.0: it must be 0 to 63"),
        (("--lossless", "--crf", 10), "means nothing with --lossless"),
        (("--fps", "1/0"), "--fps 1/0: give a rate, as 25 or 24000/1001"),
        (("--size", "100"), "--size 100: give WIDTHxHEIGHT, as 1920x1080"),
        (("--frames", "x"), "--frames x: give a whole number"),
        (("--encoder-options", "slow"), "--encoder-options slow: give NAME=VALUE"),
        (("--encoder-options", "preset=slowly"), "cannot write "),
        (("--encoder", "prores"), ".mp4 does not take prores; choose .mov"),
        (("--encoder", "hevc", "--lossless"), "--lossless is h264"),
    ],
)
def test_wrong_options_are_one_line(base, upscale, tmp_path, options, words):
    done = upscale(base, tmp_path / "out" / "out.mp4", "--bicubic", *options)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "upscaling:" not in line]
    assert len(lines) == 1 and words in lines[0] and "@ 0x" not in lines[0]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("options", "words", "remedy"),
    [
        (("--start", 500), "--start 500: it has 50 frames; choose a smaller one", ("--start", 49)),
        (("--start", 50, "--frames", 5), "--start 50: it has 50 frames; choose a smaller one", ("--start", 49)),
        (("--fps", "1/10"), "--fps 1/10: it lasts 2 s; choose at least 0.5, or leave it out", ("--fps", 0.5)),
        (("--start", 3, "--fps", "0.1"), "--fps 1/10: it lasts 2 s; choose at least 0.5, or leave", ("--fps", 0.5)),
        (("--start", 10, "--fps", 5), "--start 10: it has 10 frames at 5 frames/s;", ("--start", 9, "--fps", 5)),
    ],
)
def test_what_leaves_no_frame_is_named_and_its_remedy_holds(make, upscale, tmp_path, suffix, options, words, remedy):
    """MP4 says how many frames it has, Matroska how long it lasts."""
    source = make(f"base.{suffix}", *picture(2), "-c:v", "libx264")
    done = upscale(source, tmp_path / "out" / "out.mp4", "--bicubic", *options)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.splitlines()[-1].startswith(f"error: base.{suffix}: there is no frame to write, {words}")
    assert upscale(source, tmp_path / "out.mp4", "--bicubic", *remedy).returncode == 0
    assert probe(tmp_path / "out.mp4").frames == 1


def test_a_new_rate_counts_its_own_frames(base, upscale, tmp_path):
    """In what is predicted and in the progress."""
    done = upscale(base, tmp_path / "out.mp4", "--bicubic", "--fps", 5, "--dry-run")
    assert "64x48, 10 frames at 5 frames/s" in done.stdout
    assert "upscaling: 10/10 frame" in upscale(base, tmp_path / "out.mp4", "--bicubic", "--fps", 5).stderr


def test_a_part_is_said_to_be_without_sound(base, upscale, tmp_path):
    done = upscale(base, tmp_path / "out.mp4", "--bicubic", "--frames", 5)
    assert "base.mp4: --start and --frames: a part is written without sound and other tracks\n" in done.stderr
    assert tracks(tmp_path / "out.mp4") == [("video", "h264")]


@pytest.mark.parametrize("name", ["2026-01-02T12:30:00.mp4", "a:b.mp4", "Season #1/what?.mp4", "50 %d [x].mp4"])
def test_odd_names_in_and_out(base, upscale, tmp_path, name):
    source, output = tmp_path / "in" / name, tmp_path / "out" / name
    source.parent.mkdir(parents=True)
    shutil.copy(base, source)
    done = upscale(source, output, "--bicubic")
    assert done.returncode == 0, done.stderr
    assert len(read_video(output)) == 50


def test_a_name_that_is_no_utf8_is_one_line(base, upscale, tmp_path):
    source = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    shutil.copy(base, source)
    done = upscale(source, tmp_path / "out.mp4", "--bicubic")
    assert done.returncode == 2 and done.stderr.strip().endswith("caf\\udce9.mp4: rename it to UTF-8")


def test_outputs_that_are_refused_before_the_first_frame(base, upscale, tmp_path):
    linked, existing, folder = tmp_path / "linked.mp4", tmp_path / "existing.mp4", tmp_path / "folder"
    os.link(base, linked)
    existing.write_bytes(b"another video")
    folder.mkdir()
    content = base.read_bytes()
    for output, words in (
        (base, "it is the input"),
        (linked, "it is the input"),
        (existing, "--overwrite"),
        (folder, "it is a folder"),
        (tmp_path / "out.gif", "choose one of"),
        (base / "out.mp4", "is not a folder to write in"),
        ("/proc/nowhere/out.mp4", "/proc is not a folder to write in"),
        ("https://example.org/out.mp4", "https://example.org/out.mp4 is an address, not a file"),
    ):
        done = upscale(base, output, "--bicubic")
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, output
    for stats in (folder, "/proc/nowhere/stats.json"):
        done = upscale(base, tmp_path / "out.mp4", "--bicubic", "--stats", stats)
        assert done.returncode == 2 and "is not a folder to write in" in done.stderr
        assert not (tmp_path / "out.mp4").exists()
    assert base.read_bytes() == content and existing.read_bytes() == b"another video"
    assert upscale(base, existing, "--bicubic", "--overwrite").returncode == 0
    assert len(read_video(existing)) == 50


def test_inputs_that_are_no_files(upscale, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for source, words in (
        (tmp_path / "pipe.mp4", "pipe.mp4 is not a file; a pipe is read as -, in y4m"),
        (tmp_path / "nothing.mp4", "no video file"),
        ("rtsp://camera/1", "rtsp://camera/1 is an address, not a file"),
    ):
        done = upscale(source, tmp_path / "out.mp4", "--bicubic")
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_only_quarter_turns_are_read(base, make, upscale, tmp_path):
    turned = make("rot45.mp4", "-display_rotation", "45", "-i", "base.mp4", "-c", "copy")
    done = upscale(turned, tmp_path / "out.mp4", "--bicubic")
    assert done.returncode == 2 and "only quarter turns are read" in done.stderr


def test_a_folder_goes_on_past_a_bad_file(base, make, upscale, tmp_path):
    folder, output = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in ("a.mp4", "c.webm.mkv"):
        shutil.copy(base, folder / name)
    (folder / "b.mp4").write_text("not a video")
    (folder / "._a.mp4").write_bytes(bytes(4096))
    (folder / "notes.txt").write_text("")
    make("videos/d.gif", *picture(0.2, rate=10))
    stats = tmp_path / "stats"
    done = upscale(folder, output, "--bicubic", "--frames", 3, "--stats", stats)
    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1].startswith("failed: ") and "b.mp4" in done.stderr
    assert sorted(path.name for path in output.iterdir()) == ["a.mp4", "c.webm.mkv", "d.mkv"]
    assert sorted(path.name for path in stats.iterdir()) == ["a.mp4.json", "c.webm.mkv.json", "d.mkv.json"]
    record = json.loads((stats / "a.mp4.json").read_text())
    assert record["input"] == str(folder / "a.mp4") and record["frames"] == 3
    done = upscale(folder, output, "--bicubic", "--stats", base)
    assert done.returncode == 2 and "what a folder holds needs a folder" in done.stderr
    done = upscale(folder, folder / ".." / "videos", "--bicubic", "--overwrite")
    assert done.returncode == 2 and "is the input folder; choose another one" in done.stderr


@pytest.mark.parametrize("name", ["[error] x.mp4", "titled.mp4"])
def test_words_are_no_damage(base, make, upscale, tmp_path, name):
    source = make(name, "-i", "base.mp4", "-c", "copy", "-metadata", "title=[error] T")
    done = upscale(source, tmp_path / "out.mp4", "--bicubic", "--on-error", "stop")
    assert done.returncode == 0, done.stderr


def test_a_cropped_picture_has_the_size_that_is_shown(make, upscale, tmp_path):
    """FFmpeg 5 cuts less than asked where that leaves rows aligned: what it shows is what counts."""
    make("plain.mp4", *picture(1), "-c:v", "libx264")
    source = make("crop.mkv", "-i", "plain.mp4", "-c", "copy", "-bsf:v", "h264_metadata=crop_left=8:crop_right=8")
    info = probe(source)
    assert info.width in (48, 56) and info.height == 48
    output = tmp_path / "out.mp4"
    assert upscale(source, output, "--bicubic").returncode == 0
    assert read_video(output).shape == (25, 192, 4 * info.width, 3)


def test_pixels_of_a_turned_picture_are_turned_too(make, upscale, tmp_path):
    make("sar.mp4", *picture(0.2), "-vf", "setsar=4/3", "-c:v", "libx264")
    source = make("turned.mp4", "-display_rotation", "90", "-i", "sar.mp4", "-c", "copy")
    info = probe(source)
    assert (info.width, info.height, info.sample_aspect_ratio) == (48, 64, Fraction(3, 4))
    output = tmp_path / "out.mp4"
    assert upscale(source, output, "--bicubic").returncode == 0
    assert probe(output).sample_aspect_ratio == Fraction(3, 4)


def test_equal_stems_in_a_folder_get_names_of_their_own(base, make, upscale, tmp_path):
    folder, output = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for suffix in ("ts", "mpg", "mp4"):
        make(f"videos/a.{suffix}", "-i", "base.mp4", "-t", "0.2", "-f", "mp4" if suffix == "mp4" else "mpegts")
    done = upscale(folder, output, "--bicubic")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.iterdir()) == ["a.mp4", "a.mpg.mkv", "a.ts.mkv"]


def test_statistics_replace_neither_input_nor_output(base, upscale, tmp_path):
    content, output = base.read_bytes(), tmp_path / "out.mp4"
    for stats in (base, output):
        done = upscale(base, output, "--bicubic", "--stats", stats)
        assert done.returncode == 2 and "it is the input or the output" in done.stderr
    assert base.read_bytes() == content and not output.exists()


def test_what_an_encoder_refuses_is_known_before_the_first_frame(base, upscale, tmp_path):
    done = upscale(base, tmp_path / "out.mp4", "--bicubic", "--encoder-options", "preset=nope")
    assert done.returncode == 2 and "cannot write" in done.stderr and "upscaling:" not in done.stderr
    for options, line in (((), "--crf 60: h264 takes 0 to 51"), (("--encoder", "hevc"), "hevc takes 0 to 51")):
        done = upscale(base, tmp_path / "out.mp4", "--bicubic", "--crf", 60, *options)
        assert done.returncode == 2 and line in done.stderr
    assert upscale(base, tmp_path / "out.webm", "--bicubic", "--crf", 60).returncode == 0
    for options in (("--encoder-options", "r=10"), ("--encoder-options", "x"), ("--size", "7")):
        done = upscale(base, tmp_path / "out.mp4", "--bicubic", *options)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may encode so")
@pytest.mark.parametrize("encoder", ["h264_nvenc", "hevc_nvenc", "av1_nvenc"])
def test_an_encoder_without_its_gpu_is_one_line(base, upscale, tmp_path, encoder):
    assert upscale(base, tmp_path / "out.mp4", "--bicubic", "--encoder", encoder, "--dry-run").returncode == 0
    done = upscale(base, tmp_path / "out.mp4", "--bicubic", "--encoder", encoder)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and f"{encoder} needs a GPU and a driver that encode so; leave out" in line
    assert "libcuda" in line or "Unknown encoder" in line, "FFmpeg's own reason"
    assert not list(tmp_path.glob("*out*"))


def test_a_job_killed_after_its_output_has_its_name_is_done(base, upscale, tmp_path, monkeypatch):
    output, parts = tmp_path / "out.mp4", tmp_path / ".out.mp4.parts"
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.resumable_video.delete_parts", lambda _: None)  # killed before it
        assert upscale(base, output, "--bicubic").returncode == 0
    assert (parts / "joined.mp4").exists()
    done = upscale(base, output, "--bicubic", "--scale", 2)
    assert done.returncode == 2 and "it exists" in done.stderr and parts.exists(), "another job is not this one"
    done = upscale(base, output, "--bicubic")
    assert done.returncode == 0 and "was complete already" in done.stderr and not parts.exists()


def test_long_names_are_one_line(base, upscale, tmp_path):
    done = upscale(base, tmp_path / f"{'x' * 240}.mp4", "--bicubic")
    assert done.returncode == 2 and "longer than 220 bytes" in done.stderr
