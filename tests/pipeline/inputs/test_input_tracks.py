"""Sound, subtitles, chapters and titles arrive, or it is said before the first frame that they do not."""

import av
import numpy as np
import pytest

from common.psnr import psnr_db
from common.video_probe import ffmpeg_binary, probe
from common.video_reader import read_video
from tests.pipeline.inputs.conftest import frame_times, picture, tone, tracks


def test_everything_that_matroska_takes(base, make, upscale, tmp_path):
    (tmp_path / "s.srt").write_text("1\n00:00:00,100 --> 00:00:01,000\nline\n")
    (tmp_path / "m.txt").write_text(";FFMETADATA1\ntitle=T\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=1000\ntitle=one\n")
    (tmp_path / "font.ttf").write_bytes(b"font")
    source = make(
        "tracks.mkv", "-i", "base.mp4", "-i", "s.srt", "-i", "m.txt", "-map", "0:v", "-map", "0:a",
        "-map", "0:a", "-map", "1",
        "-map_metadata", "2", "-c:v", "copy", "-c:a", "aac", "-c:s", "srt",
        "-disposition:a:0", "0", "-disposition:a:1", "default",
        "-attach", "font.ttf", "-metadata:s:t", "mimetype=font/ttf", "-metadata:s:a:1", "language=deu",
    )  # fmt: skip
    output = tmp_path / "out.mkv"
    assert upscale(source, output, "--bicubic").returncode == 0
    with av.open(str(output)) as container:
        kinds = [(stream.type, stream.metadata.get("language")) for stream in container.streams]
        default = [bool(stream.disposition & av.stream.Disposition.default) for stream in container.streams.audio]
        assert (container.metadata.get("title"), [c["metadata"]["title"] for c in container.chapters()]) == (
            "T",
            ["one"],
        )
    assert [kind for kind, _ in kinds] == ["video", "audio", "audio", "subtitle", "attachment"]
    assert kinds[2][1] == "deu" and default == [False, True]

    mp4 = tmp_path / "out.mp4"
    done = upscale(source, mp4, "--bicubic")
    assert done.returncode == 0 and "(attachment, " in done.stderr and ".mp4 does not take it" in done.stderr
    assert tracks(mp4) == [("video", "h264"), ("audio", "aac"), ("audio", "aac"), ("subtitle", "mov_text")]


@pytest.mark.parametrize(
    ("codec", "suffix", "becomes"),
    [
        ("libopus", "avi", "mp3float"), ("pcm_s16le", "mov", "pcm_s16le"), ("pcm_s16le", "mp4", "aac"),
        ("libmp3lame", "m4v", "aac"), ("eac3", "m4v", "aac"), ("libopus", "m4v", "aac"), ("flac", "m4v", "aac"),
        ("flac", "mkv", "flac"), ("libopus", "mp4", "opus"), ("libvorbis", "mkv", "vorbis"),
    ],
)  # fmt: skip
def test_sound_is_copied_or_encoded_for_containers_that_refuse_it(make, upscale, tmp_path, codec, suffix, becomes):
    source = make("in.mkv", *picture(0.4), *tone(0.4), "-c:v", "libx264", "-c:a", codec, "-strict", "-2")
    output = tmp_path / f"out.{suffix}"
    done = upscale(source, output, "--bicubic")
    assert done.returncode == 0, done.stderr
    assert probe(output).audio_codecs == (becomes,)


def test_blu_ray_sound_is_encoded_anew(make, upscale, tmp_path):
    source = make(
        "in.m2ts", *picture(0.4), *tone(0.4), "-c:v", "libx264", "-c:a", "pcm_bluray", "-ar", "48000",
        "-f", "mpegts", "-mpegts_m2ts_mode", "1",
    )  # fmt: skip
    output = tmp_path / "out.mkv"
    done = upscale(source, output, "--bicubic")
    assert done.returncode == 0, done.stderr
    assert probe(output).audio_codecs == ("aac",)


@pytest.mark.parametrize(
    ("codec", "layout", "suffix"),
    [("ac3", "5.1(side)", "webm"), ("flac", "4.0", "webm"), ("flac", "2.1", "webm"), ("libmp3lame", "mono", "mp4")],
)
def test_layouts_and_rates_that_an_encoder_refuses_are_mixed(make, upscale, tmp_path, codec, layout, suffix):
    rate = "8000" if codec == "libmp3lame" else "48000"
    sound = ("-f", "lavfi", "-i", f"anullsrc=cl={layout}:r={rate}:d=0.4")
    source = make("in.mkv", *picture(0.4), *sound, "-c:v", "libx264", "-c:a", codec)
    done = upscale(source, tmp_path / f"out.{suffix}", "--bicubic")
    assert done.returncode == 0, done.stderr
    assert [kind for kind, _ in tracks(tmp_path / f"out.{suffix}")] == ["video", "audio"]


def test_a_second_picture_is_named_and_the_first_keeps_its_tags(make, upscale, tmp_path):
    source = make(
        "two.mkv", *picture(0.4), *picture(0.4, "32x24"), "-map", "0", "-map", "1", "-c:v", "libx264",
        "-metadata:s:v:0", "language=jpn",
    )  # fmt: skip
    output = tmp_path / "out.mkv"
    done = upscale(source, output, "--bicubic")
    assert done.returncode == 0 and "track 1 (video, h264) is left out" in done.stderr
    with av.open(str(output)) as container:
        assert container.streams.video[0].metadata["language"] == "jpn"


@pytest.mark.parametrize(
    ("source", "rate", "code"),
    [("in.mov", "25", "01:02:03:04"), ("in.mp4", "30000/1001", "01:02:03;04"), ("in.mxf", "25", "01:02:03:04")],
)
@pytest.mark.parametrize("suffix", ["mov", "mp4", "mkv", "webm"])
def test_a_time_code_is_kept(make, upscale, tmp_path, source, rate, code, suffix):
    codec = "mpeg2video" if source.endswith("mxf") else "libx264"
    path = make(
        source, "-f", "lavfi", "-i", f"testsrc2=s=64x48:r={rate}:d=0.2", "-c:v", codec, "-timecode", code,
    )  # fmt: skip
    output = tmp_path / f"out.{suffix}"
    done = upscale(path, output, "--bicubic")
    assert done.returncode == 0 and "left out" not in done.stderr
    with av.open(str(output)) as container:
        tags = [container.metadata, *(stream.metadata for stream in container.streams)]
        codes = [value for held in tags for name, value in held.items() if name.lower() == "timecode"]
        has_track = any(stream.type == "data" for stream in container.streams)
    assert codes and set(codes) == {code} and has_track == (suffix in ("mov", "mp4"))


@pytest.mark.parametrize("suffix", ["m4v", "avi"])
def test_a_time_code_is_said_to_be_left_out(make, upscale, tmp_path, suffix):
    source = make("in.mov", *picture(0.2), "-c:v", "libx264", "-timecode", "01:02:03:04")
    done = upscale(source, tmp_path / f"out.{suffix}", "--bicubic")
    assert done.returncode == 0 and f"its time code is left out: .{suffix} does not take it" in done.stderr
    assert tracks(tmp_path / f"out.{suffix}") == [("video", "h264")]


def test_a_time_code_of_another_rate_is_left_out(make, upscale, tmp_path):
    """Numbers are dropped at 29.97 frames/s alone: FFmpeg refuses to write such a code at 25."""
    source = make(
        "in.mp4", "-f", "lavfi", "-i", "testsrc2=s=64x48:r=30000/1001:d=0.2", "-c:v", "libx264",
        "-timecode", "01:02:03;04",
    )  # fmt: skip
    done = upscale(source, tmp_path / "out.mp4", "--bicubic", "--fps", 25)
    assert done.returncode == 0, done.stderr
    assert "its time code is left out: it counts frames of the source's rate" in done.stderr
    assert tracks(tmp_path / "out.mp4") == [("video", "h264")]


def test_a_track_that_nothing_decodes_is_named(make, upscale, tmp_path):
    plain = make(
        "sp.mov", *picture(1), *tone(1), *tone(1), "-map", "0", "-map", "1", "-map", "2", "-c:v", "libx264",
        "-c:a:0", "aac", "-c:a:1", "pcm_s16le",
    )  # fmt: skip
    source = tmp_path / "apac.mov"
    source.write_bytes(plain.read_bytes().replace(b"sowt", b"apac"))
    output = tmp_path / "out.mp4"
    done = upscale(source, output, "--bicubic")
    assert done.returncode == 0 and "track 2 (audio, a codec that FFmpeg does not know) is left out" in done.stderr
    assert tracks(output) == [("video", "h264"), ("audio", "aac")]


def test_a_song_with_a_cover_is_no_video(make, upscale, tmp_path):
    source = make(
        "song.mp3", *tone(1), "-f", "lavfi", "-i", "color=red:s=32x32:d=0.04", "-map", "0", "-map", "1",
        "-c:a", "libmp3lame", "-c:v", "png", "-disposition:v", "attached_pic",
    )  # fmt: skip
    done = upscale(source, tmp_path / "out.mp4", "--bicubic")
    assert done.returncode == 2 and "holds no video stream" in done.stderr


def test_the_program_that_reads_and_writes_is_the_bundled_one(base, upscale, tmp_path, monkeypatch):
    """An old FFmpeg first on PATH changes nothing."""
    old = tmp_path / "bin" / "ffmpeg"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'ffmpeg version 4.2' >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{old.parent}:/usr/bin:/bin")
    assert upscale(base, tmp_path / "out.mp4", "--bicubic").returncode == 0
    assert str(old) != ffmpeg_binary()


@pytest.mark.parametrize(
    ("name", "options", "codec", "pixels", "sound"),
    [
        ("out.mp4", ("--encoder", "hevc"), "hevc", "yuv420p", "aac"),
        ("out.mkv", ("--encoder", "hevc", "--bit-depth", 10), "hevc", "yuv420p10le", "aac"),
        ("out.webm", ("--encoder-options", "cpu-used=8"), "vp9", "yuv420p", "opus"),
        ("out.webm", ("--encoder", "av1", "--encoder-options", "preset=12"), "libdav1d", "yuv420p", "opus"),
        ("out.mov", ("--encoder", "prores"), "prores", "yuv422p10le", "aac"),
    ],
)
def test_codecs(base, upscale, tmp_path, name, options, codec, pixels, sound):
    """In parts, so that what joins them is seen as well."""
    output = tmp_path / name
    done = upscale(base, output, "--bicubic", "--part-frames", 20, *options)
    assert done.returncode == 0, done.stderr
    assert tracks(output) == [("video", codec), ("audio", sound)]
    with av.open(str(output)) as container:
        assert container.streams.video[0].pix_fmt == pixels
    times = frame_times(output)
    assert len(times) == 50 and max(abs(time - times[0] - place / 25) for place, time in enumerate(times)) < 0.0011
    frames, expected = read_video(output), tmp_path / "expected.mkv"
    assert upscale(base, expected, "--bicubic", "--lossless").returncode == 0
    assert psnr_db(np.square(frames.astype(float) - read_video(expected)).mean(), 255) > 33
