"""One video and what is to be made of it: decided, checked and said before its first frame is read."""

from __future__ import annotations

import argparse
import errno
import math
import os
import tempfile
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from common.bit_depth import BitDepth
from common.encoders import ENCODERS, IMAGE_ENCODERS, IMAGE_OUTPUT_SUFFIXES, OUTPUT_SUFFIXES
from common.errors import UserError
from common.field_order import unmarked_field_order
from common.video_probe import Colour, VideoInfo
from common.video_reader import Deinterlace, check_tone_map
from pipeline.container import TrackPlan, plan_tracks
from pipeline.image_output import ImageOutput, image_output
from pipeline.output_size import OutputSize, choose_size
from pipeline.resumable_video import naming_began
from pipeline.upscale_source import PIPE, Source, file_state
from pipeline.video_windows import Windows
from pipeline.vsr_pipeline import Tiling

#: options that do not decide pixels
_INCIDENTAL = frozenset(
    {
        "output",
        "stats",
        "encoder",
        "bit_depth",
        "part_frames",
        "restart",
        "overwrite",
        "on_error",
        "attention",
        "offload",
        "device",
        "devices",
        "stills",
        "dry_run",
    }
)
#: bytes of a file name, so that those of its parts and temporary files fit into 255
LONGEST_NAME = 220


@dataclass(frozen=True)
class Job:
    """One video and what is to be made of it, decided before the first frame."""

    source: Source
    output: Path
    size: OutputSize
    tracks: TrackPlan
    #: None: every frame keeps its time
    frame_rate: Fraction | None
    bit_depth: BitDepth
    codec: str
    windows: Windows
    tiling: Tiling
    #: where frames go if the output is images
    images: ImageOutput | None = None
    #: the output has the source's transparency
    alpha: bool = False
    #: of the frames that are written: 16 where FFmpeg makes 10 of them, or 8, dithered, of what had more
    frame_bits: BitDepth = 8
    deinterlace: Deinterlace = "auto"
    #: how the input is understood and what the output will not hold, for the user
    said: tuple[str, ...] = ()

    @property
    def info(self) -> VideoInfo:
        """Of the source."""
        return self.source.info

    @property
    def written_rate(self) -> Fraction:
        """Frames per second of the parts."""
        return self.frame_rate or self.info.frame_rate


def plan(source: Source, output: Path, arguments: argparse.Namespace) -> Job:
    """Check everything that can be checked before the first frame, and find out what the output will not hold.

    Raises:
        UserError: the output could not be written.
    """
    usual = Windows()
    windows = Windows(
        usual.frames if arguments.window is None else arguments.window,
        usual.overlap if arguments.overlap is None else arguments.overlap,
    )
    tiling = Tiling(
        transformer_tile_px=arguments.tile,
        vae_tile_px=arguments.vae_tile,
        decode_tile_px=arguments.decode_tile,
        overlap_px=arguments.tile_overlap,
    )
    deinterlace: Deinterlace = arguments.deinterlace
    if deinterlace == "detelecine":
        source = without_pulldown(source)
    if deinterlace == "auto" and source.file:
        deinterlace = unmarked_field_order(source.file, source.info) or "auto"
    hdr = source.info.colour.hdr
    if arguments.tone_map and hdr:
        check_tone_map(arguments.tone_map)
        source = replace(source, info=replace(source.info, colour=Colour()))
    info = source.info
    images = None if output == PIPE else image_output(output, source, arguments.start, arguments.frames)
    if output.is_dir() and not images:
        raise UserError(f"cannot write {output}: it is a folder; name a file in it, as video.mp4 or frame_%05d.png")
    codec = images.codec if images else "y4m" if output == PIPE else choose_codec(output, arguments.encoder)
    if codec in ("y4m", *IMAGE_ENCODERS):
        _check_alone(codec, arguments)
    elif arguments.crf is not None and arguments.crf > (largest := ENCODERS[codec].largest_crf):
        raise UserError(f"--crf {arguments.crf:g}: {codec} takes 0 to {largest}")
    if images:
        check_images(
            source, images, may_exist=arguments.overwrite or naming_began(output, job_identity(arguments, source))
        )
    elif output != PIPE:
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
        even=codec not in IMAGE_ENCODERS,
    )
    said = source.said()
    if arguments.size and not arguments.max_size and size.output != arguments.size:
        said.append("--size {}x{} becomes {}x{}: sides of a video are even".format(*arguments.size, *size.output))
    if arguments.tone_map:
        said.append(f"HDR becomes BT.709 by the curve {arguments.tone_map}" if hdr else "no HDR; nothing is mapped")
    tracks = TrackPlan()
    if source.file and codec not in ("y4m", *IMAGE_ENCODERS):
        new_rate = arguments.fps or (info.frame_rate if arguments.deinterlace == "detelecine" else None)
        tracks = plan_tracks(source.file, output.suffix.lower(), new_rate)
        if (arguments.start or arguments.frames) and (tracks.kept or tracks.dropped):
            tracks = TrackPlan(dropped=("--start and --frames: a part is written without sound and other tracks",))
        said += tracks.dropped
    elif info.audio_codecs:
        said.append(f"sound is left out: {codec} holds images alone")
    frame_rate = None if source.images and not source.images.durations_ms else arguments.fps
    if frame_rate is None and (output == PIPE or output.suffix.lower() == ".avi"):
        frame_rate = info.frame_rate  # there are no time stamps
    counted = info.frames is not None and frame_rate is None and deinterlace != "detelecine"
    if counted and arguments.start >= (info.frames or 0):
        raise nothing_to_write(source, frame_rate, arguments)
    if codec == "exr" and info.colour.hdr:
        raise UserError(
            f"cannot write {output}: EXR holds linear light, and PQ or HLG is not undone; choose .png or --tone-map"
        )
    bit_depth = choose_bit_depth(info, codec, arguments)
    alpha = info.alpha_is_read and holds_alpha(codec) and not arguments.lossless
    said += _said_of_frames(info, codec, bit_depth, alpha, arguments)
    if deinterlace in ("tff", "bff"):
        first = "upper" if deinterlace == "tff" else "lower"
        said.append(
            f"frames are not marked as interlaced but comb: deinterlaced by bwdif, the {first} field first; "
            "--deinterlace off leaves them"
        )
    deep = max(bit_depth, info.bits) > 8 and not (images or arguments.lossless)
    frame_bits: BitDepth = 16 if deep else bit_depth
    return Job(
        source, output, size, tracks, frame_rate, bit_depth, codec, windows, tiling, images, alpha, frame_bits,
        deinterlace, tuple(said),
    )  # fmt: skip


def frames_of(info: VideoInfo, rate: Fraction | None) -> int | None:
    """How many a video has, resampled to `rate` where that is given; None where it is not known."""
    if rate is None or info.video_s is None:
        return info.estimated_frames
    return round(info.video_s * rate)


def frames_to_write(job: Job, arguments: argparse.Namespace) -> int | None:
    """For progress bars; None where it is not known."""
    frames = frames_of(job.info, job.frame_rate)
    total = None if frames is None else max(frames - arguments.start, 0)
    return total if arguments.frames is None else min(arguments.frames, total or arguments.frames)


def nothing_to_write(source: Source, rate: Fraction | None, arguments: argparse.Namespace) -> UserError:
    """Which option leaves no frame of the source, and what would leave some.

    Args:
        rate: that the source is resampled to.
    """
    info = source.info
    frames = frames_of(info, rate)
    if arguments.start and frames != 0:
        total = "it ends before that" if frames is None else f"it has {frames} frames"
        at_rate = "" if rate is None or frames is None else f" at {float(rate):.6g} frames/s"
        reason = f"--start {arguments.start}: {total}{at_rate}; choose a smaller one"
    elif rate is not None and arguments.fps is not None:
        length = f": it lasts {info.video_s:.3g} s" if info.video_s else ""
        remedy = f"at least {math.ceil(1000 / info.video_s) / 1000:g}" if info.video_s else "a higher one"
        reason = f"--fps {rate}{length}; choose {remedy}, or leave it out"
    elif arguments.deinterlace == "detelecine":
        reason = "--detelecine makes four frames of five; leave it out"
    else:
        reason = "nothing can be decoded; convert it or leave it out"
    return UserError(f"{source.name}: there is no frame to write, {reason}")


def choose_bit_depth(info: VideoInfo, codec: str, arguments: argparse.Namespace) -> BitDepth:
    """What was asked for, or as deep as what comes in where that costs nothing.

    Raises:
        UserError: a depth that the codec does not have.
    """
    known: tuple[BitDepth, ...] = (8, 16) if codec in IMAGE_ENCODERS else (8, 10)
    if codec in ("jpeg", "exr"):
        known = (8,) if codec == "jpeg" else (16,)
    deep = codec == "prores" or (info.colour.hdr and not arguments.lossless)
    if codec in IMAGE_ENCODERS:
        deep = info.bits > 8 or codec == "exr"
    bit_depth: BitDepth = arguments.bit_depth or (known[-1] if deep else 8)
    if bit_depth not in known:
        raise UserError(f"--bit-depth {bit_depth}: {codec} has {' or '.join(map(str, known))} bits here")
    return bit_depth


def without_pulldown(source: Source) -> Source:
    """The source as it is read: four frames of five.

    Raises:
        UserError: images have no fields.
    """
    if source.images:
        raise UserError(f"--detelecine: {source.name} are images, not a video with fields; leave it out")
    info = source.info
    frames = info.frames and info.frames * 4 // 5
    return replace(source, info=replace(info, frame_rate=info.frame_rate * Fraction(4, 5), frames=frames))


def holds_alpha(codec: str) -> bool:
    """Whether frames in this codec have transparency."""
    return codec != "y4m" and (ENCODERS | IMAGE_ENCODERS)[codec].alpha_formats is not None


def holds_mastering(codec: str) -> bool:
    """Whether a file in this codec says which display HDR was graded on."""
    return codec in ENCODERS and ENCODERS[codec].mastering is not None


def _said_of_frames(
    info: VideoInfo, codec: str, bit_depth: BitDepth, alpha: bool, arguments: argparse.Namespace
) -> list[str]:
    """What changes in them, one line each."""
    said = []
    if info.colour.hdr and codec in ("y4m", *IMAGE_ENCODERS):
        said.append(f"HDR: {codec} does not name its transfer function and primaries; pixels keep them")
    elif info.colour.hdr:
        said.append("HDR: its transfer function and primaries are kept")
    if info.colour.mastering or info.colour.light_level:
        holds = holds_mastering(codec) and not arguments.lossless
        said.append(f"HDR mastering data is {'kept' if holds else 'left out; --encoder h264, hevc and av1 keep it'}")
    if codec == "exr":
        said.append("EXR: pixels become linear light by the sRGB curve, in half floats")
    if info.colour.hdr and bit_depth == 8:
        said.append("HDR in 8 bits shows bands")
    elif info.bits > bit_depth and not info.colour.hdr:
        more = {
            "jpeg": "; png and tiff hold 16",
            "png": "; --bit-depth 16 keeps them",
            "tiff": "; --bit-depth 16 keeps them",
        }
        hint = more.get(codec, "; --bit-depth 10 keeps 10")
        said.append(f"{info.bits} bits become {bit_depth}" + (hint if bit_depth == 8 else ""))
    if alpha:
        said.append("its transparency is kept, enlarged by a bicubic filter")
    elif info.alpha:
        keep = "; --encoder prores in a .mov, PNG and TIFF keep it" if info.alpha_is_read else ""
        said.append(f"its transparency is left out{keep}")
    if info.interlaced and arguments.deinterlace == "auto":
        said.append("frames marked as interlaced are deinterlaced by bwdif, one frame of two fields")
    if arguments.deinterlace == "detelecine":
        said.append(f"a 3:2 pulldown is undone: {float(info.frame_rate):.6g} frames/s")
    return said


def _check_alone(codec: str, arguments: argparse.Namespace) -> None:
    """Options of videos mean nothing to images and y4m.

    Raises:
        UserError: one of them was given.
    """
    given = {"--encoder": arguments.encoder, "--crf": arguments.crf, "--lossless": arguments.lossless or None}
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{option} means nothing to {codec}; leave it out")


def choose_codec(output: Path, codec: str | None) -> str:
    """The codec given, or the usual one of the container.

    Raises:
        UserError: a container that is not written here, or that does not take the codec.
    """
    suffix = output.suffix.lower()
    if suffix not in OUTPUT_SUFFIXES:
        known = ", ".join((*OUTPUT_SUFFIXES, *IMAGE_OUTPUT_SUFFIXES))
        raise UserError(f"cannot write {output}: choose one of {known}")
    codec = codec or ("vp9" if suffix == ".webm" else "h264")
    if suffix not in ENCODERS[codec].suffixes:
        raise UserError(
            f"cannot write {output}: {suffix} does not take {codec}; choose {', '.join(ENCODERS[codec].suffixes)}"
        )
    return codec


def check_output(source: Source, output: Path, *, overwrite: bool) -> None:
    """Refuse an output that could not be written hours later, or that would destroy the input.

    Raises:
        UserError: with the reason.
    """
    _refuse_input(source, output)
    if output.exists() and not overwrite:
        raise UserError(f"cannot write {output}: it exists; choose another name, or --overwrite")
    check_writable(output)


def check_images(source: Source, images: ImageOutput, *, may_exist: bool) -> None:
    """The same for images.

    Raises:
        UserError: with the reason.
    """
    existing = images.existing()
    for path in existing:
        _refuse_input(source, path)
    if existing and not may_exist:
        raise UserError(f"cannot write {images.path}: {existing[0]} exists; choose another name, or --overwrite")
    check_writable(images.file(0))


def _refuse_input(source: Source, path: Path) -> None:
    if path.exists() and any(os.path.samefile(file, path) for file in source.files):
        raise UserError(f"cannot write {path}: it is the input; choose another name")


def check_stats(path: Path, source: Source, output: Path) -> None:
    """
    Raises:
        UserError: the file cannot be made there, or it is the input or the output.
    """
    same = path.exists() and any(os.path.samefile(path, file) for file in source.files)
    if same or path.resolve() == output.resolve():
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
    if not folder.is_dir() or path.is_dir():
        raise UserError(f"cannot write {path}: {path if path.is_dir() else folder} is not a folder to write in")
    try:  # to root, access() promises more than /proc or a file server keep
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"cannot write {path}: {folder} is not a folder to write in ({error.strerror})") from None


def job_identity(arguments: argparse.Namespace, source: Source) -> dict[str, Any]:
    """All that decides the pixels of the output, for people to read where it has changed."""
    job = {name: str(value) for name, value in vars(arguments).items() if name not in _INCIDENTAL}
    model = "bicubic" if arguments.bicubic else " ".join(map(file_state, _files(arguments.model)))
    return job | {"input": source.state(), "model": model}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors"))
