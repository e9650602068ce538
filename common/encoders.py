"""What is written: codecs, the containers that take them, and the filters that bring RGB frames there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from common.video_probe import (
    BT709,
    BT2020,
    BT2020_CL,
    BT2020_NCL,
    UNSPECIFIED,
    Colour,
    MasteringDisplay,
    untagged_matrix,
)
from common.video_reader import EXACT

Quality = Literal["lossy", "lossless"]


@dataclass(frozen=True)
class Encoder:
    """One of FFmpeg's encoders."""

    name: str
    #: containers that take it
    suffixes: tuple[str, ...]
    #: that is hard to tell from the source, of `quality_option`; None: the encoder has no such number
    crf: float | None
    #: for 8 bits and for more: 10 in videos, 16 in images
    pixel_formats: tuple[str, str] = ("yuv420p", "yuv420p10le")
    options: dict[str, Any] = field(default_factory=dict)
    #: the same with transparency; None: the codec holds none
    alpha_formats: tuple[str, str] | None = None
    #: options beside those for it
    alpha_options: dict[str, Any] = field(default_factory=dict)
    #: the option in which it takes mastering data, and the value; None: it takes none
    mastering: tuple[str, Callable[[Colour], str]] | None = None
    #: FFmpeg's name of `crf`
    quality_option: str = "crf"
    #: the worst quality it knows
    largest_crf: int = 51


def _display(display: MasteringDisplay, chromaticity: int, luminance: int) -> str:
    """G(x,y)B(x,y)R(x,y)WP(x,y)L(max,min) in so many units to 1 and to 1 cd/m²; whole ones, unless it is 1 unit."""

    def number(value: Fraction, unit: int) -> str:
        return f"{float(value):.6g}" if unit == 1 else str(round(value * unit))

    points = {"G": display.green, "B": display.blue, "R": display.red, "WP": display.white}
    places = "".join(f"{name}({number(x, chromaticity)},{number(y, chromaticity)})" for name, (x, y) in points.items())
    darkest, brightest = display.luminance
    return f"{places}L({number(brightest, luminance)},{number(darkest, luminance)})"


def _parameters(display: str, light: str, chromaticity: int, luminance: int) -> Callable[[Colour], str]:
    """Mastering data as the encoder's own parameters of these names, in units as of `_display`."""

    def written(colour: Colour) -> str:
        values = [f"{display}={_display(colour.mastering, chromaticity, luminance)}"] if colour.mastering else []
        values += ["{}={},{}".format(light, *colour.light_level)] if colour.light_level else []
        return ":".join(values)

    return written


ENCODERS: dict[str, Encoder] = {
    "h264": Encoder(
        "libx264", (".mp4", ".mkv", ".mov", ".m4v", ".avi"), 15, options={"preset": "medium"},
        mastering=("x264-params", _parameters("mastering-display", "cll", 50_000, 10_000)),
    ),
    "hevc": Encoder(
        "libx265", (".mp4", ".mkv", ".mov", ".m4v"), 17,
        options={"preset": "medium", "tag:v": "hvc1", "x265-params": "log-level=error"},
        mastering=("x265-params", _parameters("master-display", "max-cll", 50_000, 10_000)),
    ),
    "av1": Encoder(
        "libsvtav1", (".mp4", ".mkv", ".webm"), 23, options={"preset": "6"},
        mastering=("svtav1-params", _parameters("mastering-display", "content-light", 1, 1)), largest_crf=63,
    ),
    "vp9": Encoder("libvpx-vp9", (".webm", ".mkv", ".mp4"), 20, options={"b:v": "0", "row-mt": "1"}, largest_crf=63),
    "prores": Encoder(
        "prores_ks", (".mov",), None, ("yuv422p10le", "yuv422p10le"), {"profile:v": "hq", "vendor": "apl0"},
        ("yuva444p10le", "yuva444p10le"), {"profile:v": "4444"},
    ),
    **{
        f"{codec}_nvenc": Encoder(
            f"{codec}_nvenc", suffixes, cq, ("yuv420p", "p010le"), {"preset": "p5", "rc": "vbr", "b:v": "0"} | tag,
            quality_option="cq",
        )
        for codec, suffixes, cq, tag in (
            ("h264", (".mp4", ".mkv", ".mov", ".m4v", ".avi"), 19, {}),
            ("hevc", (".mp4", ".mkv", ".mov", ".m4v"), 21, {"tag:v": "hvc1"}),
            ("av1", (".mp4", ".mkv", ".webm"), 27, {}),
        )
    },
}  # fmt: skip
#: those that a GPU runs
NVENC = tuple(name for name in ENCODERS if name.endswith("_nvenc"))
#: images: each packet of a part is a whole file; JPEG holds 8 bits
IMAGE_ENCODERS: dict[str, Encoder] = {
    "png": Encoder("png", (".png",), None, ("rgb24", "rgb48be"), alpha_formats=("rgba", "rgba64be")),
    "tiff": Encoder(
        "tiff", (".tif", ".tiff"), None, ("rgb24", "rgb48le"), {"compression_algo": "deflate"}, ("rgba", "rgba64le")
    ),
    "exr": Encoder("exr", (".exr",), None, ("gbrpf32le", "gbrpf32le"), {"format:v": "half", "compression": "zip16"}),
    "jpeg": Encoder("mjpeg", (".jpg", ".jpeg"), None, ("yuvj444p", "yuvj444p"), {"q:v": 2}),
}
#: standard output: raw frames after one line that says their size, rate and format
Y4M = Encoder("wrapped_avframe", (), None, options={"format": "yuv4mpegpipe", "strict": -1})
#: images that are written
IMAGE_OUTPUT_SUFFIXES = tuple(suffix for encoder in IMAGE_ENCODERS.values() for suffix in encoder.suffixes)
#: containers that take what is written here
OUTPUT_SUFFIXES = (".mp4", ".mkv", ".mov", ".m4v", ".avi", ".webm")


def encoding(
    source: Any,
    written: tuple[int, int],
    codec: str,
    *,
    quality: Quality = "lossy",
    crf: float | None = None,
    wide: bool = False,
    encoder_options: dict[str, str] | None = None,
    colour: Colour | None = None,
    alpha: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """FFmpeg's filters and output options.

    Args:
        source: ffmpeg-python's stream of RGB frames.
        written: (width, height) of them.
        codec: one of ENCODERS or IMAGE_ENCODERS, or y4m.
        quality: lossless is x264 RGB at quantiser 0, whatever the codec.
        wide: more than 8 bits.
        colour: primaries and transfer of the frames.
        alpha: the frames are RGBA, and the codec has `alpha_formats`.

    Returns:
        The stream to write, and options of the output.
    """
    if quality == "lossless":
        return source, {"preset": "medium", "vcodec": "libx264rgb", "qp": 0, "pix_fmt": "rgb24"}
    encoder = Y4M if codec == "y4m" else (ENCODERS | IMAGE_ENCODERS)[codec]
    options = encoder.options | (encoder_options or {})
    pixels = encoder.pixel_formats[wide]
    if alpha:
        assert encoder.alpha_formats is not None
        options, pixels = options | encoder.alpha_options, encoder.alpha_formats[wide]
    options |= {"vcodec": encoder.name, "pix_fmt": pixels}
    if codec in IMAGE_ENCODERS:  # untagged: readers of images expect RGB, and BT.601 in full range from a JPEG
        if codec == "jpeg":
            exact = f"bicubic+{EXACT}"
            source = source.filter("scale", out_color_matrix="smpte170m", out_range="pc", flags=exact)
        if codec == "exr":
            source = _linear(source)
        return source.filter("format", pixels), options
    if encoder.crf is not None:
        options[encoder.quality_option] = encoder.crf if crf is None else crf
    if colour is not None and (colour.mastering or colour.light_level) and encoder.mastering:
        name, parameters = encoder.mastering
        options[name] = ":".join(filter(None, (parameters(colour), options.get(name))))  # what the user says wins
    tags = _tags(colour or Colour())
    named = {"colorspace": tags.matrix, "color_primaries": tags.primaries, "color_trc": tags.transfer}
    matrix = "bt2020" if tags.matrix == BT2020_NCL else "bt709"
    if codec == "y4m":  # it holds no tags: what readers take untagged video for
        matrix = "bt709" if untagged_matrix(*written) == BT709 else "smpte170m"
        named = {}
    options |= named  # FFmpeg before 8 takes the tags from here, later ones from the frames
    source = source.filter("scale", out_color_matrix=matrix, out_range="tv", flags=f"bicubic+{EXACT}")
    source = source.filter("format", pixels).filter("setparams", range="tv", **named)
    if written[0] % 2 or written[1] % 2:  # 4:2:0 needs even sides
        source = source.filter("pad", written[0] + written[0] % 2, written[1] + written[1] % 2)
    return source, options


def _linear(source: Any) -> Any:
    """sRGB pixels as linear light, in floats."""
    source = source.filter("format", "gbrp16le")
    source = source.filter("setparams", colorspace="gbr", range="pc", color_primaries="bt709", color_trc="iec61966-2-1")
    return source.filter(
        "zscale", matrixin="gbr", matrix="gbr", rangein="full", range="full", primariesin="bt709", primaries="bt709",
        transferin="iec61966-2-1", transfer="linear",
    )  # fmt: skip


def _tags(colour: Colour) -> Colour:
    """Of a written file: the source's primaries and transfer, and the matrix that belongs to them."""
    wide = colour.matrix in (BT2020_NCL, BT2020_CL)
    primaries = (BT2020 if wide else BT709) if colour.primaries in (UNSPECIFIED, 0, 3) else colour.primaries
    transfer = BT709 if colour.transfer in (UNSPECIFIED, 0, 3) else colour.transfer
    return Colour(BT2020_NCL if primaries == BT2020 else BT709, primaries, transfer)
