"""Colours of the output are those of the source, whatever its tags say or leave out."""

import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
import skimage.data
from PIL import Image

from common.video_probe import Colour, ffmpeg_binary, probe
from common.video_reader import EXACT, VideoReader, read_video

#: bars of colours beside each other
CHART = np.array([(0x20, 0xC0, 0x40), (0xC0, 0x30, 0x28), (0x30, 0x38, 0xB0), (0x80, 0x80, 0x80)])


def chart(matrix: str, scale: str = "tv", tags: str = "") -> tuple[str, ...]:
    """CHART, converted by this matrix; `tags` are setparams' values."""
    bars = ("+".join(f"{value}*eq(floor(4*X/W),{bar})" for bar, value in enumerate(channel)) for channel in CHART.T)
    colour = "format=gbrp,geq=r='{}':g='{}':b='{}'".format(*bars)
    converted = f"scale=out_color_matrix={matrix}:out_range={scale}:flags={EXACT},format=yuv420p"
    return ("-vf", f"{colour},{converted},setparams={tags}")


def exact_rgb(path, matrix: str) -> np.ndarray:
    """The first frame by FFmpeg alone, with the matrix named."""
    command = [
        ffmpeg_binary(),
        "-v",
        "error",
        "-i",
        path,
        "-vf",
        f"scale=in_color_matrix={matrix}:flags={EXACT}",
        "-frames:v",
        "1",
    ]
    raw = subprocess.run([*command, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"], check=True, stdout=subprocess.PIPE)
    return np.frombuffer(raw.stdout, np.uint8).reshape(-1, 3)


def middles(frame: np.ndarray) -> np.ndarray:
    """The colour of each bar, in its middle."""
    height, width = frame.shape[:2]
    return frame[height // 2, width // 8 :: width // 4].astype(int)


UNTAGGED = "colorspace=unknown:color_primaries=unknown:color_trc=unknown"


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("1280x720", chart("bt709", tags=UNTAGGED)),
        ("320x240", chart("smpte170m", tags=UNTAGGED)),
        ("320x240", chart("bt709", tags="colorspace=bt709")),
        ("1280x720", chart("smpte170m", tags="colorspace=smpte170m")),
        ("320x240", chart("bt709", "pc", tags="colorspace=bt709:range=pc")),
    ],
    ids=["untagged HD", "untagged SD", "709 SD", "601 HD", "full range"],
)
def test_colours_stay(make, upscale, tmp_path, size, options):
    source = make(
        "in.mp4", "-f", "lavfi", "-i", f"nullsrc=s={size}:r=25:d=0.08", *options,
        "-c:v", "libx264", "-qp", "0",
    )  # fmt: skip
    assert np.abs(middles(read_video(source)[0]) - CHART).max() <= 2
    output = tmp_path / "out.mp4"
    assert upscale(source, output, "--bicubic", "--size", "320x240", "--frames", 1).returncode == 0
    assert np.abs(middles(exact_rgb(output, "bt709").reshape(240, 320, 3)) - CHART).max() <= 2
    with av.open(str(output)) as container:
        frame = next(container.decode(video=0))
    assert (int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc)) == (1, 1, 1)


def test_chroma_is_enlarged_smoothly_and_without_bias(make):
    """A 4:2:0 ramp of chroma, against the same ramp computed in float64."""
    source = make(
        "chroma.mkv", "-f", "lavfi", "-i", "nullsrc=s=256x64:d=0.04:r=25",
        "-vf", "geq=lum=128:cb='64+X':cr=128,format=yuv420p,setparams=colorspace=bt709:range=tv", "-c:v", "ffv1",
    )  # fmt: skip
    blue = read_video(source)[0, 32, :, 2].astype(float)
    x = np.arange(256)
    # Chroma of a 4:2:0 sample stands on the left pixel of its pair (H.264's default place).
    wanted = np.clip((128 - 16) * 255 / 219 + 1.8556 * 255 / 224 * (64 + x / 2 - 128), 0, 255)
    inner = (x > 4) & (x < 252) & (wanted > 8) & (wanted < 247)
    error = (blue - wanted)[inner]
    assert abs(error.mean()) < 1.0 and np.abs(error).max() < 2.5
    assert np.abs(np.diff(blue[inner], 2)).max() <= 2, "steps of a block"


def test_chroma_of_a_photograph(tmp_path):
    """4:2:0 and back: 1.9 dB nearer than FFmpeg's default, which repeats each value twice."""
    photograph = skimage.data.astronaut()
    Image.fromarray(photograph).save(tmp_path / "photograph.png")
    half = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+full_chroma_inp+bicubic"
    video = tmp_path / "half.mkv"
    line = [ffmpeg_binary(), "-v", "error", "-i", tmp_path / "photograph.png", "-vf", f"{half},format=yuv420p"]
    subprocess.run([*line, "-colorspace", "bt709", "-color_range", "tv", "-c:v", "ffv1", video], check=True)
    plain = ["-vf", "scale=in_color_matrix=bt709", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    default = subprocess.run([ffmpeg_binary(), "-v", "error", "-i", video, *plain], capture_output=True, check=True)

    def psnr(frame):
        chroma, wanted = (np.diff(image.astype(float), axis=2) for image in (frame, photograph))
        return 10 * np.log10(255**2 / np.square(chroma - wanted).mean())

    ours, theirs = psnr(read_video(video)[0]), psnr(np.frombuffer(default.stdout, np.uint8).reshape(photograph.shape))
    assert ours > 37.5 and ours > theirs + 1.5


@pytest.mark.parametrize(("name", "transfer"), [("arib-std-b67", 18), ("smpte2084", 16)])
def test_hdr_keeps_its_tags_and_ten_bits(make, upscale, tmp_path, name, transfer):
    tags = f"setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc={name}:range=tv"
    ramp = "geq=lum='64+X*876/192':cb=512:cr=512"
    source = make(
        "hdr.mkv", "-f", "lavfi", "-i", "nullsrc=s=192x144:r=25:d=0.2,format=yuv420p10le",
        "-vf", f"{ramp},{tags}", "-c:v", "ffv1",
    )  # fmt: skip
    output = tmp_path / "out.mkv"
    done = upscale(source, output, "--bicubic", "--crf", 1)
    assert done.returncode == 0 and "HDR" in done.stderr
    with av.open(str(output)) as container:
        frame = next(container.decode(video=0))
    assert (int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc)) == (9, 9, transfer)
    assert frame.format.name == "yuv420p10le"
    luma = frame.to_ndarray()[:576].astype(float)
    wanted = 64 + ((np.arange(768) + 0.5) / 4 - 0.5) * 876 / 192
    assert np.abs(luma[288] - wanted)[16:-16].max() < 6
    assert len(np.unique(luma[288])) > 500, "read as 8 bits"


@pytest.fixture
def graded(make):
    """PQ that says which display it was graded on, in more frames than a part holds."""
    display = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
    return make(
        "graded.mkv", "-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=0.4",
        "-vf", "format=yuv420p10le,setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc=smpte2084:range=tv",
        "-c:v", "libx265", "-x265-params", f"log-level=error:master-display={display}:max-cll=1000,400",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv"])
@pytest.mark.parametrize(
    "options",
    [
        ("--encoder", "hevc", "--encoder-options", "x265-params=log-level=error"),
        ("--encoder", "h264"),
        ("--encoder", "av1", "--encoder-options", "preset=12"),
    ],
)
def test_mastering_data_is_kept(graded, upscale, tmp_path, name, options):
    output = tmp_path / name
    done = upscale(graded, output, "--bicubic", "--part-frames", 5, *options)
    assert done.returncode == 0 and "mastering data is kept" in done.stderr, done.stderr
    before, after = probe(graded).colour, probe(output).colour
    assert before.light_level == after.light_level == (1000, 400)
    for place, wanted in {
        "red": (0.68, 0.32), "green": (0.265, 0.69), "blue": (0.15, 0.06), "white": (0.3127, 0.329),
    }.items():  # fmt: skip
        for colour in (before, after):
            assert np.allclose([float(value) for value in getattr(colour.mastering, place)], wanted, atol=2e-5)
    darkest, brightest = after.mastering.luminance
    assert brightest == 1000 and abs(darkest - Fraction(5, 1000)) < Fraction(1, 16384)


def test_mastering_data_is_said_to_be_left_out(graded, upscale, tmp_path):
    done = upscale(graded, tmp_path / "out.mov", "--bicubic", "--encoder", "prores")
    assert done.returncode == 0 and "mastering data is left out; --encoder h264, hevc and av1" in done.stderr
    assert probe(tmp_path / "out.mov").colour.mastering is None


#: linear light of BT.709's primaries in units of 100 cd/m²
LIGHT = np.array([(0.2, 0.2, 0.2), (1, 1, 1), (6, 6, 6), (2.0, 0.5, 0.2)])
BT709_TO_BT2020 = np.array([(0.6274, 0.3293, 0.0433), (0.0691, 0.9195, 0.0114), (0.0164, 0.0880, 0.8956)])


def pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084 of light in units of 100 cd/m²."""
    power = (light / 100) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light: np.ndarray) -> np.ndarray:
    """ARIB STD-B67 of light in units of 100 cd/m² on a display of 1000 cd/m²: the system gamma is 1.2 (BT.2100)."""
    luminance = light @ (0.2627, 0.6780, 0.0593) / 10
    scene = light / 10 * luminance[:, None] ** (1 / 1.2 - 1)
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073)


def hable(light: np.ndarray, peak: float) -> np.ndarray:
    """Hable's filmic curve."""
    return _filmic(light) / _filmic(np.float64(peak))


def mobius(light: np.ndarray, peak: float) -> np.ndarray:
    """Linear up to 0.3, then a Möbius transform that is smooth there and 1 at the peak."""
    j = 0.3
    a, b = -j * j * (peak - 1) / (j * j - 2 * j + peak), (j * j - 2 * j * peak + peak) / (peak - 1)
    return np.where(light <= j, light, (b + j) ** 2 / (b - a) * (light + a) / (light + b))


def reinhard(light: np.ndarray, peak: float) -> np.ndarray:
    """x / (x + 1), scaled to 1 at the peak."""
    return light / (light + 1) * (peak + 1) / peak


def _filmic(light: np.ndarray) -> np.ndarray:
    return (light * (0.15 * light + 0.05) + 0.004) / (light * (0.15 * light + 0.5) + 0.06) - 0.02 / 0.3


@pytest.fixture(params=["smpte2084", "arib-std-b67"])
def bars(make, tmp_path, request):
    """LIGHT beside each other in PQ or HLG, and BT.2020."""
    curve = pq if request.param == "smpte2084" else hlg
    codes = np.rint(curve(LIGHT @ BT709_TO_BT2020.T) * 1023).astype("<u2")
    frame = np.broadcast_to(np.repeat(codes, 24, axis=0), (48, 96, 3))
    (tmp_path / "raw").write_bytes(frame[..., [1, 2, 0]].transpose(2, 0, 1).tobytes())  # planes G, B, R
    tags = f"color_primaries=bt2020:color_trc={request.param}"
    return make(
        "bars.mkv", "-f", "rawvideo", "-pix_fmt", "gbrp10le", "-s", "96x48", "-r", "25", "-i", "raw",
        "-vf", f"setparams=colorspace=gbr:range=pc:{tags},zscale=matrix=2020_ncl:range=limited,format=yuv444p10le",
        "-c:v", "ffv1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("curve", "light_level", "peak"),
    [(hable, None, 1000), (hable, 250, 250), (mobius, None, 1000), (reinhard, None, 1000)],
)
def test_hdr_becomes_sdr_by_the_curve(bars, upscale, tmp_path, curve, light_level, peak):
    """Up to the brightest pixel that the file names; what is brighter is white."""
    source, output = bars, tmp_path / "out.mp4"
    if light_level:
        source = tmp_path / "named.mkv"
        named = f"log-level=error:lossless=1:max-cll={light_level},100"
        recode = [ffmpeg_binary(), "-v", "error", "-i", bars, "-c:v", "libx265", "-x265-params", named, source]
        subprocess.run(recode, check=True)
    done = upscale(source, output, "--bicubic", "--tone-map", curve.__name__, "--crf", 1)
    assert done.returncode == 0 and f"HDR becomes BT.709 by the curve {curve.__name__}" in done.stderr, done.stderr
    assert probe(output).colour == Colour(1, 1, 1) and probe(output).bits == 8
    brightest = LIGHT.max(axis=1, keepdims=True)
    mapped = LIGHT * curve(brightest, peak / 100) / brightest
    wanted = 255 * np.minimum(mapped, 1) ** (1 / 2.4)
    seen = read_video(output)[0, 96, 48::96]
    assert np.abs(seen - wanted).max() <= 3, (seen, wanted)


def test_hdr_that_names_its_curve_alone_is_taken_for_bt2020(make, bars, upscale, tmp_path):
    bare = make("bare.mkv", "-i", bars, "-vf", "setparams=colorspace=unknown:color_primaries=unknown", "-c:v", "ffv1")
    assert probe(bare).colour.primaries == probe(bare).colour.matrix == 2 and probe(bare).colour.hdr
    for source in (bars, bare):
        assert upscale(source, tmp_path / f"{source.stem}.mp4", "--bicubic", "--tone-map", "hable").returncode == 0
    assert np.array_equal(read_video(tmp_path / "bars.mp4"), read_video(tmp_path / "bare.mp4"))


def test_sdr_is_not_mapped_and_an_ffmpeg_without_the_filter_is_one_line(base, bars, upscale, tmp_path, monkeypatch):
    for name, options in (("plain", ()), ("asked", ("--tone-map", "hable"))):
        done = upscale(base, tmp_path / f"{name}.mp4", "--bicubic", *options)
    assert done.returncode == 0 and "no HDR; nothing is mapped" in done.stderr
    assert np.array_equal(read_video(tmp_path / "plain.mp4"), read_video(tmp_path / "asked.mp4"))
    lean = tmp_path / "ffmpeg"
    lean.write_text(f'#!/bin/sh\n{ffmpeg_binary()} "$@" | sed /zscale/d\n')
    lean.chmod(0o755)
    monkeypatch.setenv("DUO_VSR_FFMPEG", str(lean))
    done = upscale(bars, tmp_path / "out.mp4", "--bicubic", "--tone-map", "hable")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "--tone-map hable: this FFmpeg has no zscale filter" in line


def test_transparency_and_depth_are_said_to_be_left_out(make, upscale, tmp_path):
    source = make(
        "alpha.mov", "-f", "lavfi", "-i", "color=c=red@0.0:s=64x48:d=0.2,format=yuva444p10le",
        "-c:v", "prores_ks", "-profile:v", "4444",
    )  # fmt: skip
    done = upscale(source, tmp_path / "out.mov", "--bicubic")
    assert done.returncode == 0 and "its transparency is left out; --encoder prores" in done.stderr
    assert "become 8" in done.stderr


@pytest.mark.parametrize(
    ("pixels", "values", "within"),
    [
        ("gbrp10le", "g='X*1023/63':b='X*1023/63':r='X*1023/63'", 100),
        ("yuv420p10le", "lum='64+X*876/63':cb=512:cr=512", 100),
        ("yuv444p12le", "lum='256+X*3504/63':cb=2048:cr=2048", 40),
        ("gray10le", "lum='X*1023/63'", 120),
    ],
)
def test_sixteen_bits_are_read(make, pixels, values, within):
    """A grey ramp up to white, to a step of the file's own."""
    source = make(
        "deep.mkv", "-f", "lavfi", "-i", f"nullsrc=s=64x16:d=0.04:r=25,format={pixels}", "-vf", f"geq={values}",
        "-c:v", "ffv1",
    )  # fmt: skip
    frame = next(iter(VideoReader(source, bits=16)))
    assert frame.dtype == np.uint16
    assert np.abs(frame[8, :, 0] - np.arange(64) * 65535 / 63).max() < within


def luma_of(path) -> np.ndarray:
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    return frame.to_ndarray()[: frame.height].astype(float)


def test_what_has_eight_bits_has_the_same_colours_in_ten(make, upscale, tmp_path):
    source = make(
        "grey.mkv", "-f", "lavfi", "-i", "nullsrc=s=64x32:d=0.04:r=25",
        "-vf", "geq=lum='16+73*floor(X/16)':cb=128:cr=128,format=yuv420p", "-c:v", "ffv1",
    )  # fmt: skip
    output = tmp_path / "out.mkv"
    assert upscale(source, output, "--bicubic", "--bit-depth", 10, "--crf", 1).returncode == 0
    assert np.abs(luma_of(output)[64, 32::64] - 4 * (16 + 73 * np.arange(4))).max() <= 1


def test_a_gradient_is_dithered(make, upscale, tmp_path):
    """10 bits become 8: of 8 x 8 pixels, the mean is right to a third of a level, where rounding leaves steps."""
    source = make(
        "ramp.mkv", "-f", "lavfi", "-i", "nullsrc=s=256x32:d=0.04:r=25,format=yuv420p10le",
        "-vf", "geq=lum='400+X/16':cb=512:cr=512", "-c:v", "ffv1",
    )  # fmt: skip
    output = tmp_path / "out.mkv"
    done = upscale(source, output, "--bicubic", "--crf", 1)
    assert done.returncode == 0 and "10 bits become 8" in done.stderr
    mean = luma_of(output).reshape(16, 8, 128, 8).mean((0, 1, 3))
    wanted = ((400 + ((np.arange(1024) + 0.5) / 4 - 0.5) / 16) / 4).reshape(128, 8).mean(1)
    assert np.abs(mean - wanted)[2:-2].max() < 0.35
