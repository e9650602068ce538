"""Every frame keeps its time, and sound its distance from the picture."""

import itertools
import json

import av
import numpy as np
import pytest

from common.field_order import unmarked_field_order
from common.scene_cuts import SceneCuts, small_frame
from common.video_probe import probe
from common.video_reader import VideoReader, read_video
from tests.pipeline.inputs.conftest import frame_times, picture, sound_start, tone

#: of a frame at 25 frames/s
HALF_FRAME_S = 0.02
#: an AAC frame at 48 kHz
AAC_FRAME_S = 0.0214


def test_variable_frame_rate(make, upscale, tmp_path):
    """50 frames/s for two seconds, then 5."""
    source = make(
        "vfr.mp4", *picture(4, rate=50), *tone(4), "-vf", "select='lt(t,2)+not(mod(n,10))'", "-fps_mode", "vfr",
        "-c:v", "libx264", "-c:a", "aac",
    )  # fmt: skip
    for suffix in ("mp4", "mkv"):
        output = tmp_path / f"out.{suffix}"
        assert upscale(source, output, "--bicubic").returncode == 0
        times = frame_times(output)
        assert len(times) == 110 and abs(times[100] - times[0] - 2.0) < HALF_FRAME_S / 2
        assert np.allclose(np.diff(times[100:]), 0.2, atol=0.002)


def test_a_recording_whose_header_has_no_rate(make, upscale, tmp_path):
    source = make("recorder.webm", *picture(3), "-c:v", "libvpx", "-b:v", "200k", "-f", "webm", "-live", "1")
    output = tmp_path / "out.mp4"
    assert upscale(source, output, "--bicubic").returncode == 0
    times = frame_times(output)
    assert len(times) == 75 and np.allclose(times, np.arange(75) / 25, atol=1e-4)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
@pytest.mark.parametrize("late", ["picture", "sound"])
def test_one_track_starts_later(base, make, upscale, tmp_path, suffix, late):
    first, second = ("-itsoffset", "1.0", "-i", "base.mp4"), ("-i", "base.mp4")
    inputs = (*first, *second) if late == "picture" else (*second, *first)
    source = make(f"late.{suffix}", *inputs, "-map", "0:v", "-map", "1:a", "-c", "copy")
    output = tmp_path / "out.mp4"
    assert upscale(source, output, "--bicubic").returncode == 0
    before, after = (frame_times(path)[0] - sound_start(path) for path in (source, output))
    assert abs(after - (1.0 if late == "picture" else -1.0)) < 0.06
    assert abs(after - before) < AAC_FRAME_S


def test_parts_do_not_drift(make, upscale, model_folder, tmp_path):
    source = make("ntsc.mp4", *picture(4, "32x24", "30000/1001"), "-c:v", "libx264")
    output = tmp_path / "out.mp4"
    assert upscale(source, output, "--bicubic", "--part-frames", 7).returncode == 0
    assert np.allclose(frame_times(output), np.arange(120) * 1001 / 30000, atol=1e-5)


def test_a_constant_rate_on_demand(make, upscale, tmp_path):
    source = make(
        "vfr.mp4", *picture(2, rate=50), "-vf", "select='not(mod(n,3))'", "-fps_mode", "vfr", "-c:v", "libx264"
    )
    output = tmp_path / "out.mp4"
    assert upscale(source, output, "--bicubic", "--fps", 25).returncode == 0
    times = frame_times(output)
    assert probe(output).frame_rate == 25 and np.allclose(times, np.arange(len(times)) / 25, atol=1e-4)
    assert abs(len(times) - 50) <= 1


def test_avi_has_a_constant_rate_and_the_right_duration(make, upscale, tmp_path):
    source = make("vfr.mp4", *picture(4, rate=50), "-vf", "select='lt(t,2)+not(mod(n,10))'", "-fps_mode", "vfr")
    output = tmp_path / "out.avi"
    done = upscale(source, output, "--bicubic")
    assert done.returncode == 0
    assert abs(probe(output).duration_s - 3.8) < 0.25
    assert done.stderr.count("upscaling: ") == 1, "frames are counted at the new rate"
    period_s = float(1 / probe(output).frame_rate)
    assert np.allclose(np.diff(frame_times(output)), period_s, atol=1e-4)
    with av.open(str(output)) as container:
        kinds = [frame.pict_type for frame in container.decode(video=0)]
    assert len(kinds) > 100 and av.video.frame.PictureType.B not in kinds


def test_a_minute_stays_in_sync(make, upscale, tmp_path):
    """A white frame and a click every seven seconds stay as far from each other as they were."""
    source = make(
        "minute.mp4", *("-f", "lavfi", "-i", "color=black:s=32x24:r=30000/1001:d=60"),
        *("-f", "lavfi", "-i", "aevalsrc='sin(4000*t)*lt(mod(t,7),0.03)':s=48000:d=60"),
        "-vf", "drawbox=color=white:t=fill:enable='lt(mod(t,7),0.03)'", "-c:v", "libx264", "-c:a", "aac",
    )  # fmt: skip
    output = tmp_path / "out.mp4"
    assert upscale(source, output, "--bicubic", "--scale", 1, "--part-frames", 100).returncode == 0

    def distances(path):
        white = np.array(frame_times(path))[read_video(path).mean((1, 2, 3)) > 128]
        with av.open(str(path)) as container:
            sound = [(frame.time, frame.to_ndarray()[0]) for frame in container.decode(audio=0)]
        loud = np.concatenate([time + np.flatnonzero(np.abs(samples) > 0.3) / 48000 for time, samples in sound])
        return white - loud[np.flatnonzero(np.diff(loud, prepend=-1) > 1)]

    before, after = distances(source), distances(output)
    assert len(before) == len(after) == 9
    assert np.abs(after - before).max() < AAC_FRAME_S


@pytest.mark.parametrize(
    ("name", "fields", "encoder", "words"),
    [
        ("marked.mpg", "interleave_top,setfield=tff", ("mpeg2video", "-q:v", "2", "-flags", "+ilme+ildct"), "marked"),
        (
            "upper.mp4",
            "interleave_top,setfield=prog",
            ("libx264", "-qp", "5"),
            "comb: deinterlaced by bwdif, the upper",
        ),
        ("lower.mkv", "interleave_bottom,setfield=prog", ("ffv1",), "comb: deinterlaced by bwdif, the lower"),
    ],
)
def test_interlaced_video_has_no_combs(make, upscale, tmp_path, name, fields, encoder, words):
    """A vertical edge that moves 6 px a field: woven, every other line of the frame is displaced."""
    source = make(
        name, "-f", "lavfi", "-i", "color=white:s=200x576:r=50:d=1", "-vf",
        f"pad=720:576:'100':0,scroll=h=-0.01,tinterlace={fields},format=yuv420p", "-c:v", *encoder,
    )  # fmt: skip
    output = tmp_path / "out.mp4"
    done = upscale(source, output, "--bicubic", "--scale", 1, "--frames", 8)
    assert done.returncode == 0 and words in done.stderr, done.stderr
    woven = tmp_path / "woven.mp4"
    assert upscale(source, woven, "--bicubic", "--scale", 1, "--frames", 8, "--deinterlace", "off").returncode == 0

    def combs(path):
        luma = read_video(path)[3:6].astype(float).mean(-1)
        return np.abs(np.diff(luma, axis=1)).mean()

    assert combs(output) < 0.2 * combs(woven)


@pytest.mark.parametrize("size", ["640x480", "192x144"])
def test_fine_patterns_that_move_are_not_interlaced(make, size):
    """idet takes a part of these frames for interlaced, and nearly all of a small size, which no field ever had."""
    source = make("in.mkv", *picture(2, size), "-c:v", "libx264", "-preset", "ultrafast")
    assert unmarked_field_order(source, probe(source)) is None


def test_a_pulldown_is_undone(make, upscale, tmp_path):
    """24 frames/s woven into 30: the 24 come back, each as it was, at the film's rate."""
    scene, quality = (
        ("-f", "lavfi", "-i", "testsrc2=s=96x96:r=24000/1001:d=2,scroll=h=0.04,format=yuv444p"),
        ("-c:v", "ffv1"),
    )
    film, output = make("film.mkv", *scene, *quality), tmp_path / "out.mkv"
    source = make("pulldown.mkv", *scene, "-vf", "telecine=first_field=top:pattern=23,setfield=tff", *quality)
    options = ("--bicubic", "--lossless")
    assert upscale(film, tmp_path / "whole.mkv", *options).returncode == 0
    done = upscale(source, output, *options, "--detelecine")
    assert done.returncode == 0 and "23.976 frames/s" in done.stderr
    whole, result = read_video(tmp_path / "whole.mkv"), read_video(output)
    assert abs(len(result) - len(whole)) <= 1
    best = [np.abs(frame.astype(int) - whole.astype(int)).mean((1, 2, 3)) for frame in result[4:40]]
    assert max(distances.min() for distances in best) < 0.5, "no frame combs"
    assert np.all(np.diff([distances.argmin() for distances in best]) == 1), "none is doubled or missing"
    assert np.allclose(np.diff(frame_times(output)), 1001 / 24000, atol=0.002)
    assert upscale(source, tmp_path / "x.mkv", "--bicubic", "--detelecine", "--deinterlace", "off").returncode == 2


def test_video_that_turns_interlaced_has_no_combs_and_keeps_its_progressive_frames(make, upscale, tmp_path):
    moving = ("-f", "lavfi", "-i", "color=white:s=48x64:r=50:d=1", "-vf")
    scroll = "pad=128:64:'25':0,scroll=h=-0.03"
    ending = ("-c:v", "libx264", "-crf", "10", "-bf", "0", "-pix_fmt", "yuv420p")
    make("first.ts", *moving, f"{scroll},fps=25", *ending)
    fields = f"{scroll},tinterlace=interleave_top,setfield=tff"
    make(
        "then.ts", *moving, fields, *ending, "-flags", "+ilme+ildct", "-x264-params", "tff=1", "-output_ts_offset", "1"
    )
    source = tmp_path / "turns.ts"
    source.write_bytes((tmp_path / "first.ts").read_bytes() + (tmp_path / "then.ts").read_bytes())
    auto, woven = tmp_path / "auto.mkv", tmp_path / "woven.mkv"
    options = ("--bicubic", "--lossless")  # a smaller scale would mean lines away
    assert upscale(source, auto, *options).returncode == 0
    assert upscale(source, woven, *options, "--deinterlace", "off").returncode == 0
    result, plain = read_video(auto).astype(float).mean(-1), read_video(woven).astype(float).mean(-1)
    assert len(result) == len(plain) == 50
    assert np.allclose(frame_times(auto), frame_times(woven), atol=1e-3)
    assert np.array_equal(result[:24], plain[:24]), "progressive frames pass unchanged"

    def combs(luma):
        return np.abs(np.diff(luma[28:44], axis=1)).mean()

    assert combs(result) < 0.3 * combs(plain)


@pytest.mark.parametrize("every", [10, 2])
def test_flashes_are_no_cuts(every):
    """White frames, single or every other one, in a video that moves."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 200, (80, 160, 3), dtype=np.uint8)
    cuts, finder = [], SceneCuts()
    for number in range(60):
        frame = np.full_like(scene, 255) if number % every == every // 2 else np.roll(scene, number, axis=1)
        cuts += finder.add(small_frame(frame))
    assert cuts + finder.finish() == []


@pytest.mark.parametrize("white", ["eq(mod(n,10),5)", "eq(mod(n,2),1)"], ids=["flashes", "strobe"])
def test_flashes_cost_no_evaluations(make, upscale, model_folder, tmp_path, white):
    source = make(
        "flashes.mp4", *picture(2), "-vf", f"drawbox=color=white:t=fill:enable='{white}'",
        "-c:v", "libx264", "-qp", "1",
    )  # fmt: skip
    stats = tmp_path / "stats.json"
    options = ("--model", model_folder, "--stats", stats, "--max-size", 64)
    assert upscale(source, tmp_path / "out.mp4", *options).returncode == 0
    assert json.loads(stats.read_text())["dit_evaluations"] == 3, "50 frames are three windows"


def test_a_cut_beside_flashes_is_found():
    rng = np.random.default_rng(0)
    scenes = [rng.integers(0, 200, (80, 160, 3), dtype=np.uint8) for _ in range(2)]
    cuts, finder = [], SceneCuts()
    for number, scene in enumerate(itertools.chain([scenes[0]] * 20, [scenes[1]] * 20)):
        cuts += finder.add(small_frame(np.full_like(scene, 255) if number in (8, 30) else scene))
    assert cuts + finder.finish() == [20]


def test_time_stamps_that_start_anew(base, make, upscale, tmp_path):
    """Two recordings in one file: picture and sound of both, one after the other, at any rate."""
    single = make("one.ts", "-i", "base.mp4", "-t", "2", "-c", "copy")
    source = tmp_path / "twice.ts"
    source.write_bytes(single.read_bytes() * 2)
    for name, options in (("out.mp4", ()), ("rate.mp4", ("--fps", 25))):
        output = tmp_path / name
        assert upscale(source, output, "--bicubic", *options).returncode == 0
        times = frame_times(output)
        assert len(times) == 100 and abs(times[-1] - times[0] - 3.96) < HALF_FRAME_S
        with av.open(str(output)) as container:
            sound = container.streams.audio[0]
            assert float(sound.duration * sound.time_base) > 3.9


def test_a_size_that_changes_counts_no_frame_anew(make, upscale, tmp_path):
    first = make("s1.ts", *picture(1), "-c:v", "libx264", "-bf", "0")
    second = make("s2.ts", *picture(1, "96x64"), "-c:v", "libx264", "-bf", "0", "-output_ts_offset", "1")
    source = tmp_path / "sizes.ts"
    source.write_bytes(first.read_bytes() + second.read_bytes())
    for option, count in ((("--start", 10), 40), (("--start", 30), 20), (("--frames", 40), 40)):
        output = tmp_path / f"{option[0]}-{count}.mp4"
        assert upscale(source, output, "--bicubic", *option).returncode == 0
        assert len(frame_times(output)) == count


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_last_frame_stays_as_long_as_it_did(make, upscale, tmp_path, suffix):
    longer = "setts=duration=if(gte(N\\,24)\\,75\\,DURATION)"
    source = make("still.mp4", *picture(1), "-c:v", "libx264", "-bf", "0", "-bsf:v", longer)
    reader = VideoReader(source)
    assert len(list(reader)) == 25
    if not reader.last_duration:
        pytest.skip("an FFmpeg before 6 neither tells nor copies the duration of a last frame")
    before, output = probe(source).duration_s, tmp_path / f"out.{suffix}"
    assert before > 3
    assert upscale(source, output, "--bicubic").returncode == 0
    assert abs(probe(output).duration_s - before) < HALF_FRAME_S


def test_streams_that_start_at_five_seconds_are_whole(base, make, upscale, tmp_path):
    source = make("at5.mkv", "-i", "base.mp4", "-c", "copy", "-output_ts_offset", "5")
    done = upscale(source, tmp_path / "out.mkv", "--bicubic")
    assert done.returncode == 0 and "warning" not in done.stderr
    assert upscale(source, tmp_path / "slow.mkv", "--bicubic", "--fps", 5).returncode == 0
