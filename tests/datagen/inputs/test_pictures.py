"""Videos as people have them: turned, untagged, interlaced, damaged. Datagen cuts out of them what upscaling shows."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from common.lossless_clip import UnreadableVideo, opened, read_window, write_lossless
from common.video_probe import count_frames, probe
from common.video_reader import EXACT, read_video
from datagen.config import ClipConfig, DatagenConfig, FilterConfig
from datagen.dataset.data_card import left_out
from datagen.encode.clip import empty_crop
from datagen.plan import make_plan
from datagen.survey.source_survey import SourceSurvey
from datagen.survey.video_survey import black_bars
from datagen.survey.window_reader import WindowReader
from tests.datagen.inputs.conftest import H264, Make, lavfi, picture, surveyed

#: smooth, so that decoders of different rounding agree
SOFT = "gradients=s=192x144:r={rate}:d={seconds}:c0=red:c1=blue:x0=10:y0=20:x1=180:y1=100:speed=0.01,format=yuv420p"
SOUND = ("-f", "lavfi", "-i", "sine=d=2")


def assert_shown_as_upscaled(path: Path, found: SourceSurvey) -> None:
    """As many frames as FFmpeg decodes, and the second window's are those that upscaling reads."""
    assert found.frames == count_frames(path, probe(path))
    start, pts, frames = found.windows[1].start, found.windows[1].pts, 9
    window = WindowReader().read(path.name, lambda: str(path), path.name, start, pts, frames)
    shown = read_video(path, start, frames)
    assert window.shape == shown.shape == (frames, found.height, found.width, 3)
    assert np.abs(window.astype(int) - shown).max() <= 2


def test_a_phone_held_upright(make: Make) -> None:
    """Size and frames are those of the turned picture, as in upscale."""
    make("flat.mp4", *lavfi(SOFT.format(rate=25, seconds=1)), *H264)
    phone = make("phone.mp4", "-display_rotation", "90", "-i", "flat.mp4", "-c", "copy")
    found = surveyed(phone, frames=9)
    assert (found.width, found.height) == (144, 192)
    assert_shown_as_upscaled(phone, found)


def test_sound_that_nothing_decodes_and_a_picture_that_begins_late(make: Make) -> None:
    """A phone's second sound track; streams of a capture that do not begin together."""
    base = str(make("base.mp4", *lavfi(SOFT.format(rate=25, seconds=2)), *SOUND, *H264, "-c:a", "aac"))
    maps = ("-map", "0:v", "-map", "0:a", "-map", "0:a")
    apac = make("apac.mov", "-i", base, *maps, "-c:v", "copy", "-c:a:0", "copy", "-c:a:1", "pcm_s16le")
    apac.write_bytes(apac.read_bytes().replace(b"sowt", b"apac"))
    files = [apac]
    for suffix in ("mkv", "mp4", "ts"):
        late = ("-itsoffset", "1.0", "-i", base, "-i", base, "-map", "0:v", "-map", "1:a", "-c", "copy")
        files.append(make(f"late.{suffix}", *late))
    for path in files:
        found = surveyed(path, frames=9)
        assert (found.frames, found.frames_per_second) == (50, 25), path.name
        assert_shown_as_upscaled(path, found)


def test_a_capture_that_begins_inside_a_group_of_pictures(make: Make) -> None:
    whole = make("whole.ts", *lavfi(SOFT.format(rate=25, seconds=4)), *H264, "-g", "25")
    content = whole.read_bytes()
    path = whole.with_name("midgop.ts")
    path.write_bytes(content[len(content) // 3 // 188 * 188 :])
    found = surveyed(path, frames=9)
    assert 50 <= found.frames < 75
    assert_shown_as_upscaled(path, found)


def test_rates_that_no_header_tells(make: Make) -> None:
    """A browser's recorder writes none; of a variable rate, windows are frames, whatever their times."""
    live = ("-c:v", "libvpx", "-f", "webm", "-live", "1")
    recorder = make("recorder.webm", *lavfi(SOFT.format(rate=20, seconds=3)), *live)
    found = surveyed(recorder, frames=9)
    assert found.frames == 60 and found.frames_per_second == pytest.approx(20, abs=0.1)
    assert_shown_as_upscaled(recorder, found)
    select = "select='lt(t,2)+not(mod(n,10))'"
    vfr = make("vfr.mp4", *lavfi(SOFT.format(rate=50, seconds=4)), "-vf", select, "-fps_mode", "vfr", *H264)
    found = surveyed(vfr, frames=9)
    assert found.frames == 110
    assert_shown_as_upscaled(vfr, found)


def test_a_damaged_packet_costs_the_source(make: Make) -> None:
    """What is concealed is no target."""
    path = make("damaged.mp4", *picture(2, "64x48"), "-c:v", "libx264", "-g", "25", "-bf", "0")
    with opened(str(path), path.name) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.pos]
    content = bytearray(path.read_bytes())
    place, size = packets[30]
    content[place : place + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(UnreadableVideo, match=r"damaged\.mp4: breaks off after \d+ frames"):
        surveyed(path, frames=9)


def test_a_cover_before_the_film_is_not_the_film(make: Make) -> None:
    make("cover.png", *lavfi("color=red:s=32x32:d=0.04"), "-frames:v", "1")
    make("film.mp4", *lavfi(SOFT.format(rate=25, seconds=1)), *H264)
    maps = ("-map", "0", "-map", "1", "-c", "copy", "-disposition:v:0", "attached_pic")
    path = make("film.m4v", "-i", "cover.png", "-i", "film.mp4", *maps)
    found = surveyed(path, frames=9)
    assert (found.width, found.height, found.frames) == (192, 144, 25)
    assert_shown_as_upscaled(path, found)


def test_fine_texture_is_not_empty(tmp_path: Path) -> None:
    """Stripes of 8 px: nothing of them is left in a thumbnail; LR shows them."""
    stripes = np.where(np.arange(1280 + 9) // 8 % 2, 140, 110).astype(np.uint8)
    texture = np.stack([np.broadcast_to(stripes[n : n + 1280, None], (704, 1280, 3)) for n in range(9)])
    write_lossless(tmp_path / "texture.mkv", texture)
    write_lossless(tmp_path / "flat.mkv", np.full_like(texture, 125))
    fine, flat = (surveyed(tmp_path / name, frames=9).windows[0] for name in ("texture.mkv", "flat.mkv"))
    assert fine.contrast == pytest.approx(15, abs=3) and flat.contrast == 0
    assert empty_crop(texture, FilterConfig()) is None
    assert empty_crop(np.full_like(texture, 125), FilterConfig()) == "empty crop: contrast 0.0 is below 4.0"


@pytest.mark.parametrize(("size", "matrix"), [("1280x720", "bt709"), ("320x240", "smpte170m")])
def test_untagged_video(make: Make, size: str, matrix: str) -> None:
    chain = (
        f"format=gbrp,geq=r=32:g=192:b=64,scale=out_color_matrix={matrix}:out_range=tv:flags={EXACT},format=yuv420p,"
        "setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown"
    )
    source = f"nullsrc=s={size}:r=25:d=0.08"
    path = make("in.mp4", *lavfi(source), "-vf", chain, "-c:v", "libx264", "-qp", "0")
    assert np.abs(read_window(path, 0, 1).astype(int) - (32, 192, 64)).max() <= 2


def test_a_turned_untagged_video_has_the_matrix_of_its_turned_size(make: Make) -> None:
    """1200 x 640 turned is 640 x 1200: high definition by its lines, for datagen as for upscaling."""
    colour = "format=gbrp,geq=r=32:g=192:b=64,scale=out_color_matrix=bt709:out_range=tv:flags=" + EXACT
    tags = "format=yuv420p,setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown"
    options = ("-vf", f"{colour},{tags}", "-c:v", "libx264", "-qp", "0")
    make("flat.mp4", *lavfi("nullsrc=s=1200x640:r=25:d=0.08"), *options)
    path = make("turned.mp4", "-display_rotation", "90", "-i", "flat.mp4", "-c", "copy")
    for frames in (read_window(path, 0, 1), read_video(path, 0, 1)):
        assert frames.shape == (1, 1200, 640, 3)
        assert np.abs(frames.astype(int) - (32, 192, 64)).max() <= 2


def test_targets_are_not_darkened(make: Make) -> None:
    """A grey ramp with colour: swscale's default loses about one level of 255 on average."""
    ramp = "format=gbrp,geq=r='40+X/2':g='60+X/3':b='200-X/2',scale=out_color_matrix=smpte170m:flags=" + EXACT
    source = "nullsrc=s=256x64:r=25:d=0.08"
    options = ("-vf", f"{ramp},format=yuv444p", "-c:v", "ffv1")
    path = make("in.mkv", *lavfi(source), *options)
    x = np.arange(256)
    wanted = np.stack([40 + x / 2, 60 + x / 3, 200 - x / 2], axis=-1)
    error = read_window(path, 0, 1)[0].astype(float) - wanted
    assert np.abs(error.mean((0, 1))).max() < 0.6 and np.abs(error).max() < 3


def test_what_makes_bad_targets_is_left_out_by_name(make: Make, tmp_path: Path) -> None:
    pattern = picture(1)
    fields = (*picture(1, rate=50), "-vf", "tinterlace=interleave_top,setfield=tff")
    hlg = "format=yuv420p10le,setparams=color_primaries=bt2020:color_trc=arib-std-b67:colorspace=bt2020nc"
    mpeg = ("-flags", "+ilme+ildct", "-c:v", "mpeg2video", "-q:v", "2")
    make("interlaced.mpg", *fields, *mpeg)
    make("hlg.mp4", *pattern, "-vf", hlg, *H264)
    make("letterboxed.mp4", *pattern, "-vf", "pad=192:192:0:24", *H264)
    make("good.mp4", *pattern, *H264)
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
    kinds = left_out([{"kind": "filtered"} | line for line in plan.rejected])["sources"]
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


def test_a_song_with_a_cover_is_no_video(make: Make) -> None:
    options = ("-map", "0", "-map", "1", "-c:a", "libmp3lame", "-c:v", "png", "-disposition:v", "attached_pic")
    inputs = lavfi("sine=d=1", "color=red:s=32x32:d=0.04")
    path = make("song.mp3", *inputs, *options)
    with pytest.raises(UnreadableVideo, match="holds no video stream"):
        opened(str(path), path.name)
