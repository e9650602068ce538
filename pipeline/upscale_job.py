"""One video and what is to be made of it: decided, checked and said before its first frame is read."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from common.video_probe import VideoInfo, probe
from common.video_writer import ENCODERS, OUTPUT_SUFFIXES
from pipeline.container import TrackPlan, plan_tracks
from pipeline.output_size import OutputSize, choose_size
from pipeline.video_windows import Windows
from pipeline.vsr_pipeline import Tiling

#: options that do not decide pixels
_INCIDENTAL = frozenset(
    {"output", "stats", "codec", "bit_depth", "part_frames", "restart", "overwrite", "on_error", "attention", "device"}
)
#: bytes of a file name, so that those of its parts and temporary files fit into 255
LONGEST_NAME = 220


@dataclass(frozen=True)
class Job:
    """One video and what is to be made of it, decided before the first frame."""

    source: Path
    output: Path
    info: VideoInfo
    size: OutputSize
    tracks: TrackPlan
    #: None: every frame keeps its time
    frame_rate: Fraction | None
    bit_depth: Literal[8, 10]
    codec: str
    windows: Windows
    tiling: Tiling

    @property
    def written_rate(self) -> Fraction:
        """Frames per second of the parts."""
        return self.frame_rate or self.info.frame_rate


def plan(source: Path, output: Path, arguments: argparse.Namespace) -> Job:
    """Check everything that can be checked before the first frame, and say what the output will not hold.

    Raises:
        UserError: the input is no video, or the output could not be written.
    """
    windows = Windows(arguments.window, arguments.overlap)
    tiling = Tiling(
        transformer_tile_px=arguments.tile,
        vae_tile_px=arguments.vae_tile,
        decode_tile_px=arguments.decode_tile,
        overlap_px=arguments.tile_overlap,
    )
    info = probe(source)
    codec = choose_codec(output, arguments.codec)
    check_output(source, output, overwrite=arguments.overwrite)
    if arguments.stats:
        check_stats(arguments.stats, source, output)
    size = choose_size(
        info.width,
        info.height,
        info.sample_aspect_ratio,
        scale=arguments.scale,
        lines=arguments.height,
        size=arguments.size,
        max_size=arguments.max_size,
    )
    tracks = plan_tracks(source, output.suffix.lower())
    frame_rate = arguments.fps
    said = list(tracks.dropped)
    if output.suffix.lower() == ".avi" and frame_rate is None:
        frame_rate = info.frame_rate  # the container has no time stamps
    deep = codec == "prores" or (info.colour.hdr and not arguments.lossless)
    bit_depth: Literal[8, 10] = arguments.bit_depth or (10 if deep else 8)
    if info.colour.hdr:
        said.append("HDR: its transfer function and primaries are kept, mastering data is left out")
        if bit_depth == 8:
            said.append("HDR in 8 bits shows bands")
    elif info.bits > bit_depth:
        said.append(f"{info.bits} bits become {bit_depth}" + ("; --bit-depth 10 keeps 10" if bit_depth == 8 else ""))
    if info.alpha:
        said.append("its transparency is left out")
    if info.interlaced and arguments.deinterlace == "auto":
        said.append("frames marked as interlaced are deinterlaced by bwdif, one frame of two fields")
    for line in said:
        print(f"{source.name}: {line}", file=sys.stderr)
    return Job(source, output, info, size, tracks, frame_rate, bit_depth, codec, windows, tiling)


def choose_codec(output: Path, codec: str | None) -> str:
    """The codec given, or the usual one of the container.

    Raises:
        UserError: a container that is not written here, or that does not take the codec.
    """
    suffix = output.suffix.lower()
    if suffix not in OUTPUT_SUFFIXES:
        raise UserError(f"cannot write {output}: choose one of {', '.join(OUTPUT_SUFFIXES)}")
    codec = codec or ("vp9" if suffix == ".webm" else "h264")
    if suffix not in ENCODERS[codec].suffixes:
        raise UserError(
            f"cannot write {output}: {suffix} does not take {codec}; choose {', '.join(ENCODERS[codec].suffixes)}"
        )
    return codec


def check_output(source: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse an output that could not be written hours later, or that would destroy the input.

    Raises:
        UserError: with the reason.
    """
    if output.is_dir():
        raise UserError(f"cannot write {output}: it is a folder; name a file in it")
    if output.exists() and os.path.samefile(source, output):
        raise UserError(f"cannot write {output}: it is the input; choose another name")
    if output.exists() and not overwrite:
        raise UserError(f"cannot write {output}: it exists; choose another name, or --overwrite")
    check_writable(output)


def check_stats(path: Path, source: Path, output: Path) -> None:
    """
    Raises:
        UserError: the file cannot be made there, or it is the input or the output.
    """
    if path.resolve() in (source.resolve(), output.resolve()) or (path.exists() and os.path.samefile(path, source)):
        raise UserError(f"--stats {path}: it is the input or the output; choose another name")
    check_writable(path)


def check_writable(path: Path) -> None:
    """
    Raises:
        UserError: the file cannot be made there.
    """
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UserError(f"cannot write {path}: its name is longer than {LONGEST_NAME} bytes; choose a shorter one")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise UserError(f"cannot write {path}: {path if path.is_dir() else folder} is not a folder to write in")


def job_identity(arguments: argparse.Namespace, source: Path) -> dict[str, Any]:
    """All that decides the pixels of the output, for people to read where it has changed."""
    job = {name: str(value) for name, value in vars(arguments).items() if name not in _INCIDENTAL}
    model = "bicubic" if arguments.bicubic else " ".join(map(_state, _files(arguments.model)))
    return job | {"input": _state(source), "model": model}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors"))


def _state(path: Path) -> str:
    state = path.stat()
    return f"{path.resolve()} of {state.st_size} bytes at {state.st_mtime_ns}"
