"""Options of `python -m pipeline.upscale`: checked before a frame is read."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NoReturn, get_args

import torch

from common.encoders import ENCODERS
from common.errors import UserError
from common.video_reader import ToneMap
from pipeline.colour_fix import ColourFix
from pipeline.latent_codec import CodecName
from pipeline.model.config import Attention
from pipeline.model.prompts import DEFAULT_PROMPT
from pipeline.output_size import parse_size

#: the smallest and largest value of each number
_RANGES: dict[str, tuple[float, float | None]] = {
    "scale": (0, 32), "height": (8, None), "max_size": (8, None), "seed": (0, 2**63 - 1), "steps": (1, 1000),
    "guidance": (0, None), "window": (5, None), "overlap": (0, None), "tile": (16, None), "vae_tile": (16, None),
    "decode_tile": (16, None), "tile_overlap": (0, None), "start": (0, None), "frames": (1, None), "crf": (0, 63),
    "part_frames": (1, None), "fps": (0.01, 1000),
}  # fmt: skip
#: what an option that is no plain number looks like
_FORMS = {
    "size": "WIDTHxHEIGHT, as 1920x1080", "fps": "a rate, as 25 or 24000/1001",
    "encoder-options": "NAME=VALUE, as preset=slow,tune=film",
}  # fmt: skip
#: numbers that networks compute with
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: options of the model, which `--bicubic` does without
_OF_THE_MODEL = ("vae_dtype", "offload", "compile", "fixed_noise")
#: FFmpeg options that upscale itself sets
_OWN_OPTIONS = frozenset(
    {"r", "vf", "filter", "pix_fmt", "c", "vcodec", "codec", "crf", "cq", "qp", "s", "bf", "frames"}
)
#: what is used without --model: a small model, trained on a CPU (docs/small.md)
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "assets" / "small"
#: its DiT tile: attention over all places of a frame would take a CPU minutes, and it was trained on clips of 128 px
DEFAULT_MODEL_TILE_PX = 384
CODECS = " or ".join(get_args(CodecName))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        words: in place of the process's own.

    Raises:
        UserError: a value outside its range, two options that exclude each other, a device that is not there.
    """
    arguments = _parser().parse_args(words)
    for name, (low, high) in _RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            limits = f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be {limits}")
    if arguments.lossless and arguments.crf is not None:
        raise UserError(f"--crf {arguments.crf} means nothing with --lossless; leave one of them out")
    if arguments.codec in ENCODERS:
        raise UserError(
            f"--codec {arguments.codec}: the file's codec is --encoder {arguments.codec}; --codec is {CODECS}"
        )
    if arguments.codec not in (None, *get_args(CodecName)):
        raise UserError(f"--codec {arguments.codec}: choose {CODECS}")
    if arguments.bicubic and arguments.codec == "fast":
        raise UserError("--codec fast means nothing with --bicubic; leave one of them out")
    if arguments.lossless and arguments.encoder not in (None, "h264"):
        raise UserError(f"--lossless is h264; leave it or --encoder {arguments.encoder} out")
    if arguments.encoder_options and (arguments.lossless or set(arguments.encoder_options) & _OWN_OPTIONS):
        names = ", ".join(arguments.encoder_options)
        raise UserError(f"--encoder-options {names}: set by options of upscale itself; leave it out")
    if arguments.crf is not None and arguments.encoder and ENCODERS[arguments.encoder].crf is None:
        raise UserError(f"--crf means nothing to {arguments.encoder}; leave it out")
    if arguments.lossless and arguments.bit_depth == 10:
        raise UserError("lossless files hold 8 bits; leave out --lossless or --bit-depth 10")
    for name in _OF_THE_MODEL:
        if arguments.bicubic and getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} means nothing with --bicubic; leave one of them out")
    for device in arguments.devices or (arguments.device,):
        try:
            kind = torch.device(device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda", "mps"):
            raise UserError(f"--device {device}: choose cpu, cuda, cuda:1, … or mps")
        if arguments.offload and kind != "cuda":
            raise UserError(f"--offload with --device {device}: only a GPU has a memory of its own; leave it out")
    if arguments.model is None and not arguments.bicubic:
        arguments.model = _default_model()
        if arguments.tile is None:
            arguments.tile = DEFAULT_MODEL_TILE_PX
    if arguments.codec is None:
        trained = arguments.model is not None and (arguments.model / "fast_decoder").is_dir()
        arguments.codec = "fast" if trained else "full"
    if arguments.codec == "fast" and arguments.vae_dtype and (arguments.model / "lr_encoder").is_dir():
        raise UserError(f"--vae-dtype: the fast codec of {arguments.model} needs no VAE; leave it out, or --codec full")
    return arguments


def dtypes(arguments: argparse.Namespace) -> tuple[torch.dtype, torch.dtype]:
    """Of the model, and of its VAE."""
    return DTYPES[arguments.dtype], DTYPES[arguments.vae_dtype or arguments.dtype]


def _default_model() -> Path:
    """
    Raises:
        UserError: it is not there, as in an installation without the repository.
    """
    if not (DEFAULT_MODEL / "model_index.json").is_file():
        raise UserError("--model is needed: the small model lies in the repository's assets/, not in the package")
    print("no --model: the small model of assets/small, trained on a CPU; see docs/small.md", file=sys.stderr)
    return DEFAULT_MODEL


def _devices(text: str) -> tuple[str, ...]:
    """Numbers of GPUs, or names as `--device` takes."""
    return tuple(f"cuda:{name}" if name.isdigit() else name for name in text.split(","))


def _rate(text: str) -> Fraction:
    """
    Raises:
        ValueError: no number, or 1/0 (argparse names the option).
    """
    try:
        return Fraction(text)
    except ZeroDivisionError:
        raise ValueError(text) from None


def _encoder_options(text: str) -> dict[str, str]:
    """`name=value,name=value`.

    Raises:
        ValueError: another form (argparse names the option).
    """
    return dict(pair.split("=", 1) for pair in text.split(","))


def _path(text: str) -> Path:
    """
    Raises:
        UserError: the address of something elsewhere.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        raise UserError(f"{text} is an address, not a file; download what is there, or write here and upload it")
    return Path(text)


class _Parser(argparse.ArgumentParser):
    """One line for a wrong option."""

    def error(self, message: str) -> NoReturn:
        if wrong := re.fullmatch(r"argument --([\w-]+): invalid (\w+) value: '(.*)'", message):
            name, kind, value = wrong.groups()
            form = _FORMS.get(name) or ("a whole number" if kind == "int" else "a number")
            raise UserError(f"--{name} {value}: give {form}")
        raise UserError(f"{message}; --help lists the options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m pipeline.upscale", description="Upscale videos with a one-step model, ×4 or to any size."
    )
    parser.add_argument("input", type=_path, help="a video, an image, images as frame_%%05d.png, a folder, or - (y4m)")
    parser.add_argument(
        "output", type=_path, help="a file, images as frame_%%05d.png, a folder where the input is one, or - (y4m)"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, help="model folder (what training exports); default: the small one here")
    model.add_argument(
        "--bicubic", action="store_true", help="no model: the baseline, what the model is conditioned on"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--scale", type=float, help="of both sides; default: 4, which is what the model does")
    sizes.add_argument("--height", type=int, help="lines of the output; the width follows")
    sizes.add_argument("--size", type=parse_size, metavar="WIDTHxHEIGHT")
    parser.add_argument("--max-size", type=int, help="no side of the output is larger, px")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="one of the model's cached prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fixed-noise", action="store_true", help="the same noise in all frames: what the model invents moves less"
    )
    parser.add_argument("--steps", type=int, help="Euler steps; default: what the model was made for")
    parser.add_argument("--guidance", type=float, help="w of v(c) + w(v(c) - v(0)); default: the model's")
    parser.add_argument(
        "--codec", metavar="{full,fast}",
        help="of the latents: the VAE, or what stands beside it in the model folder, trained to replace it; default: "
        "fast where there is one",
    )  # fmt: skip
    parser.add_argument("--window", type=int, help="frames the model sees at a time; default: 21")
    parser.add_argument("--overlap", type=int, help="frames that consecutive windows share; default: 5")
    parser.add_argument("--tile", type=int, help="DiT tile in output pixels; default: undivided, 384 without --model")
    parser.add_argument("--vae-tile", type=int, help="VAE tile in output pixels; default: what memory holds")
    parser.add_argument("--decode-tile", type=int, help="VAE decoder tile; default: as --vae-tile")
    parser.add_argument("--tile-overlap", type=int, default=128, help="pixels; less than 128 may leave seams")
    parser.add_argument("--colour-fix", choices=get_args(ColourFix), default="wavelet")
    parser.add_argument("--start", type=int, default=0, help="first frame")
    parser.add_argument("--frames", type=int, help="how many frames; default: all")
    parser.add_argument(
        "--fps",
        type=_rate,
        help="a constant rate, as 25 or 24000/1001; default: frames keep their times, images are 25 a second",
    )  # fmt: skip
    parser.add_argument("--stills", action="store_true", help="upscale the images of a folder one by one")
    fields = parser.add_mutually_exclusive_group()
    fields.add_argument(
        "--deinterlace", choices=("auto", "bwdif", "off"), default="auto", help="auto: frames marked as interlaced"
    )
    fields.add_argument(
        "--detelecine", dest="deinterlace", action="store_const", const="detelecine",
        help="a film at 30 frames/s by 3:2 pulldown: back to its 24",
    )  # fmt: skip
    parser.add_argument("--tone-map", choices=get_args(ToneMap), help="HDR becomes BT.709; default: it stays HDR")
    parser.add_argument(
        "--on-error", choices=("warn", "keep", "stop"), default="warn",
        help="a damaged input: write what can be read and end with status 3 (warn) or 0 (keep), or stop",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", choices=tuple(ENCODERS), help="of the file; *_nvenc: on the GPU; default: vp9 for .webm, else h264"
    )
    parser.add_argument("--crf", type=float, help="quality; default: the encoder's own, hard to tell from the source")
    parser.add_argument(
        "--encoder-options", type=_encoder_options, default={}, metavar="NAME=VALUE,…", help="as preset=slow"
    )
    parser.add_argument("--lossless", action="store_true", help="x264 RGB without loss, for scoring")
    parser.add_argument(
        "--bit-depth", type=int, choices=(8, 10, 16), help="10: videos, 16: PNG, TIFF, EXR; default: 10 for HDR"
    )
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    devices.add_argument(
        "--devices", type=_devices, default=(), metavar="0,1,…", help="GPUs that share the windows of a video"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--vae-dtype", choices=tuple(DTYPES), help="of the VAE; default: as --dtype")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "--offload", action="store_true", help="VAE and DiT take turns on the GPU: less memory, more time"
    )
    memory.add_argument("--compile", action="store_true", help="torch.compile the DiT's blocks: pays for long videos")
    parser.add_argument("--attention", choices=get_args(Attention), default="auto")
    parser.add_argument(
        "--part-frames", type=int, default=750, help="a killed job loses at most so many frames and a window"
    )
    parser.add_argument("--dry-run", action="store_true", help="print size, windows, memory and disk; write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--restart", action="store_true", help="delete the parts that an earlier run left")
    parser.add_argument(
        "--stats",
        type=Path,
        help="write what was done and how long it took as JSON; for a folder a folder, a file each",
    )
    return parser
