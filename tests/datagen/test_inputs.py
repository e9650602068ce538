"""Videos as people have them: turned, untagged, cut into short shots. Datagen cuts out of them what is shown."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest

from common.lossless_clip import UnreadableVideo, opened, read_window
from common.video_reader import EXACT, read_video
from datagen.config import ClipConfig, DatagenConfig, FilterConfig
from datagen.dataset.data_card import left_out
from datagen.plan import make_plan
from datagen.sources import Source
from datagen.survey.source_survey import SourceSurvey
from datagen.survey.video_survey import black_bars, survey
from datagen.survey.window_reader import WindowReader


def ffmpeg(folder: Path, name: str, *options: str) -> Path:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-nostdin", *options, name]
    subprocess.run(command, cwd=folder, check=True)
    return folder / name


def surveyed(path: Path, **clip: object) -> SourceSurvey:
    return survey(Source(id=path.name, path=str(path)), str(path), ClipConfig(**clip))  # type: ignore[arg-type]


def test_a_phone_held_upright(tmp_path: Path) -> None:
    """Size and frames are those of the turned picture, as in upscale."""
    smooth = "gradients=s=192x144:r=25:d=1:c0=red:c1=blue:x0=10:y0=20:x1=180:y1=100:speed=0.01"
    ffmpeg(tmp_path, "flat.mp4", "-f", "lavfi", "-i", smooth, "-c:v", "libx264", "-qp", "4")
    phone = ffmpeg(tmp_path, "phone.mp4", "-display_rotation", "90", "-i", "flat.mp4", "-c", "copy")
    found = surveyed(phone, frames=9)
    assert (found.width, found.height) == (144, 192)
    window = WindowReader().read("phone", lambda: str(phone), "phone", 9, found.windows[1].pts, 9)
    shown = read_video(phone, 9, 9)
    assert window.shape == shown.shape == (9, 192, 144, 3)
    assert np.abs(window.astype(int) - shown).max() <= 2


@pytest.mark.parametrize(("size", "matrix"), [("1280x720", "bt709"), ("320x240", "smpte170m")])
def test_untagged_video(tmp_path: Path, size: str, matrix: str) -> None:
    chain = (
        f"format=gbrp,geq=r=32:g=192:b=64,scale=out_color_matrix={matrix}:out_range=tv:flags={EXACT},format=yuv420p,"
        "setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown"
    )
    source = f"nullsrc=s={size}:r=25:d=0.08"
    path = ffmpeg(tmp_path, "in.mp4", "-f", "lavfi", "-i", source, "-vf", chain, "-c:v", "libx264", "-qp", "0")
    assert np.abs(read_window(path, 0, 1).astype(int) - (32, 192, 64)).max() <= 2


def test_a_turned_untagged_video_has_the_matrix_of_its_turned_size(tmp_path: Path) -> None:
    """1200 x 640 turned is 640 x 1200: high definition by its lines, for datagen as for upscaling."""
    picture = "format=gbrp,geq=r=32:g=192:b=64,scale=out_color_matrix=bt709:out_range=tv:flags=" + EXACT
    tags = "format=yuv420p,setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown"
    options = ("-vf", f"{picture},{tags}", "-c:v", "libx264", "-qp", "0")
    ffmpeg(tmp_path, "flat.mp4", "-f", "lavfi", "-i", "nullsrc=s=1200x640:r=25:d=0.08", *options)
    path = ffmpeg(tmp_path, "turned.mp4", "-display_rotation", "90", "-i", "flat.mp4", "-c", "copy")
    for frames in (read_window(path, 0, 1), read_video(path, 0, 1)):
        assert frames.shape == (1, 1200, 640, 3)
        assert np.abs(frames.astype(int) - (32, 192, 64)).max() <= 2


def test_targets_are_not_darkened(tmp_path: Path) -> None:
    """A grey ramp with colour: swscale's default loses about one level of 255 on average."""
    ramp = "format=gbrp,geq=r='40+X/2':g='60+X/3':b='200-X/2',scale=out_color_matrix=smpte170m:flags=" + EXACT
    source = "nullsrc=s=256x64:r=25:d=0.08"
    options = ("-vf", f"{ramp},format=yuv444p", "-c:v", "ffv1")
    path = ffmpeg(tmp_path, "in.mkv", "-f", "lavfi", "-i", source, *options)
    x = np.arange(256)
    wanted = np.stack([40 + x / 2, 60 + x / 3, 200 - x / 2], axis=-1)
    error = read_window(path, 0, 1)[0].astype(float) - wanted
    assert np.abs(error.mean((0, 1))).max() < 0.6 and np.abs(error).max() < 3


def test_no_window_holds_a_cut(tmp_path: Path) -> None:
    """Shots of 30, 10 and 50 frames: the one of 10 has no window of 21 frames, and none reaches into it."""
    graph = (
        "[1:v]trim=end_frame=10,setpts=PTS-STARTPTS,format=yuv420p[m];[0:v]format=yuv420p[a];"
        "[2:v]format=yuv420p,negate[b];[a][m][b]concat=n=3[o]"
    )
    inputs = ("testsrc2=s=320x240:r=25:d=1.2", "mandelbrot=s=320x240:r=25", "testsrc=s=320x240:r=25:d=2")
    sources = [word for text in inputs for word in ("-f", "lavfi", "-i", text)]
    options = ("-filter_complex", graph, "-map", "[o]", "-c:v", "libx264", "-qp", "5")
    path = ffmpeg(tmp_path, "shots.mp4", *sources, *options)
    found = surveyed(path, frames=21, stride=3)
    assert found.cuts == (30, 40)
    starts = [window.start for window in found.windows]
    assert starts and all(start + 21 <= 30 or start >= 40 for start in starts)
    assert any(start >= 40 for start in starts)


def test_what_makes_bad_targets_is_left_out_by_name(tmp_path: Path) -> None:
    pattern = ("-f", "lavfi", "-i", "testsrc2=s=192x144:r=25:d=1")
    fields = ("-f", "lavfi", "-i", "testsrc2=s=192x144:r=50:d=1", "-vf", "tinterlace=interleave_top,setfield=tff")
    hlg = "format=yuv420p10le,setparams=color_primaries=bt2020:color_trc=arib-std-b67:colorspace=bt2020nc"
    mpeg, h264 = ("-flags", "+ilme+ildct", "-c:v", "mpeg2video", "-q:v", "2"), ("-c:v", "libx264", "-qp", "4")
    ffmpeg(tmp_path, "interlaced.mpg", *fields, *mpeg)
    ffmpeg(tmp_path, "hlg.mp4", *pattern, "-vf", hlg, *h264)
    ffmpeg(tmp_path, "letterboxed.mp4", *pattern, "-vf", "pad=192:192:0:24", *h264)
    ffmpeg(tmp_path, "good.mp4", *pattern, *h264)
    surveys = [surveyed(path, frames=9) for path in sorted(tmp_path.iterdir())]
    config = DatagenConfig(clip=ClipConfig(frames=9, crop=(96, 96)))
    plan = make_plan(surveys, config, {})
    reasons = {line["source"]: line["reason"] for line in plan.rejected if "start" not in line}
    assert reasons.keys() == {"hlg.mp4", "interlaced.mpg", "letterboxed.mp4"}
    assert reasons["hlg.mp4"] == "hdr: transfer function HLG"
    assert reasons["interlaced.mpg"] == "interlaced: 1.0 of the frames is above 0.05"
    assert reasons["letterboxed.mp4"] == f"letterboxed: {surveys[-1].bars} in black bars is above 0.04"
    assert surveys[-1].bars == pytest.approx(0.25, abs=0.02)
    assert {sample.source for sample in plan.samples} == {"good.mp4"}
    kinds = left_out([{"kind": "filtered"} | line for line in plan.rejected])
    assert (kinds["HDR"], kinds["interlaced"], kinds["letterboxed"]) == (1, 1, 1)
    kept = FilterConfig(hdr=True, max_interlaced=1, max_bars=1, duplicate_distance=0)
    plan = make_plan(surveys, config.model_copy(update={"filters": kept}), {})
    assert {sample.source for sample in plan.samples} == {survey.source.id for survey in surveys}


def test_black_bars_have_an_edge_across_the_frame() -> None:
    picture = np.full((144, 256), 100, np.uint8)
    for bars, part in (((18, 18, 0, 0), 0.25), ((0, 0, 32, 40), 0.25), ((18, 0, 0, 0), 0.0), ((0, 0, 0, 0), 0.0)):
        top, bottom, left, right = bars
        framed = np.zeros_like(picture)
        framed[top : 144 - bottom, left : 256 - right] = picture[top : 144 - bottom, left : 256 - right]
        assert black_bars(framed) == part, bars
    globe = cv2.circle(np.zeros_like(picture), (128, 72), 60, 100, -1)
    assert black_bars(globe) == black_bars(np.zeros_like(picture)) == 0.0


def test_a_song_with_a_cover_is_no_video(tmp_path: Path) -> None:
    options = ("-map", "0", "-map", "1", "-c:a", "libmp3lame", "-c:v", "png", "-disposition:v", "attached_pic")
    inputs = ("-f", "lavfi", "-i", "sine=d=1", "-f", "lavfi", "-i", "color=red:s=32x32:d=0.04")
    path = ffmpeg(tmp_path, "song.mp3", *inputs, *options)
    with pytest.raises(UnreadableVideo, match="holds no video stream"):
        opened(str(path), path.name)
