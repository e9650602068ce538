"""Upscale videos and images, ×4 or to any size.

    python -m pipeline.upscale in.mp4 out.mp4 --model MODEL_DIR [--scale 2 | --height 2160 | --size 3840x2160]
    python -m pipeline.upscale FOLDER OUTPUT_FOLDER --model MODEL_DIR
    python -m pipeline.upscale 'frames/%05d.png' 'upscaled/%05d.png' --model MODEL_DIR
    ffmpeg -i in.mp4 -f yuv4mpegpipe - | python -m pipeline.upscale - - --model MODEL_DIR | ffmpeg -i - out.mp4

The video streams through in windows that overlap and are cross-faded, cut at scene changes (pipeline/video_windows.py).
Every frame keeps its time; sound, subtitles, chapters and titles are kept (pipeline/container.py). The output is
written atomically. Run the command again to resume a killed job.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.atomic import write_atomic
from common.command_line import exit_on_sigterm
from common.encoders import IMAGE_OUTPUT_SUFFIXES, OUTPUT_SUFFIXES
from common.errors import UserError, run_command
from common.image_files import holds_a_sequence, images_in
from common.scale import SCALE
from common.video_probe import VIDEO_SUFFIXES, named_like_a_video
from pipeline.dry_run import disk_warning, report
from pipeline.finish_output import finish, rehearse
from pipeline.fit_memory import fit, record, resumed
from pipeline.image_output import stills_of
from pipeline.resumable_video import VideoParts, delete_parts, only_job, only_lock_left, was_finished
from pipeline.sound_check import sound_damage
from pipeline.upscale_job import Job, job_identity, nothing_to_write, plan
from pipeline.upscale_options import parse_arguments
from pipeline.upscale_run import Watch, damage_of, upscale_parts, write_to_pipe, writer_of
from pipeline.upscale_source import PIPE, Source, open_source

#: exit status of a command whose input was damaged, or of a folder with a video that could not be upscaled
EXIT_DAMAGED = 3


def main() -> None:
    exit_on_sigterm()  # the partial file is removed
    arguments = parse_arguments()
    folder = arguments.input.is_dir()
    if arguments.stills and not folder:
        raise UserError(f"--stills {arguments.input}: it is for a folder of images")
    if folder and (arguments.stills or not holds_a_sequence(arguments.input)):
        bad = upscale_folder(arguments)
    else:
        bad = upscale_file(arguments.input, arguments.output, arguments)
    if bad:
        raise SystemExit(EXIT_DAMAGED)


def upscale_folder(arguments: argparse.Namespace) -> bool:
    """Every video of the input folder, with `--stills` every image, under its name in the output folder; what is there
    already is left alone.

    Returns:
        Whether some failed, or are damaged and `--on-error` is warn; they are listed at the end.

    Raises:
        UserError: no video in the folder, or the output or `--stats` is a file.
    """
    sources = stills_of(arguments.input) if arguments.stills else _videos_of(arguments.input)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"{arguments.output} is a file; what a folder holds needs a folder")
    if arguments.output.exists() and os.path.samefile(arguments.output, arguments.input):
        raise UserError(f"{arguments.output} is the input folder; choose another one for the output")
    if arguments.stats and arguments.stats.exists() and not arguments.stats.is_dir():
        raise UserError(f"--stats {arguments.stats} is a file; what a folder holds needs a folder")
    failed = []
    names = [f"{source.stem}{_folder_suffix(source)}" for source in sources]
    for number, (source, name) in enumerate(zip(sources, names, strict=True), 1):
        if names.count(name) > 1 and source.name != name:
            name = f"{source.name}{_folder_suffix(source)}"
        output = arguments.output / name
        if output.exists() and not arguments.overwrite:
            print(f"{number} of {len(sources)}: {output} is there already", file=sys.stderr)
            continue
        print(f"{number} of {len(sources)}: {source.name}", file=sys.stderr)
        try:
            own_stats = arguments.stats and arguments.stats / f"{output.name}.json"
            if upscale_file(source, output, argparse.Namespace(**vars(arguments) | {"stats": own_stats})):
                failed.append(f"damaged: {source}")
        except (UserError, OSError) as error:
            failed.append(f"failed: {error}")
    for line in failed:
        print(line, file=sys.stderr)
    return bool(failed)


def _videos_of(folder: Path) -> list[Path]:
    videos = sorted(path for path in folder.iterdir() if _is_video(path))
    if not videos:
        raise UserError(f"no video in {folder} ({', '.join(VIDEO_SUFFIXES)}), and no image")
    if images := images_in(folder):
        print(
            f"{folder}: {len(images)} images beside the videos are left alone; --stills upscales them", file=sys.stderr
        )
    return videos


def _is_video(path: Path) -> bool:
    """By its name; an animated GIF is one as well."""
    return named_like_a_video(path.name) or path.suffix.lower() == ".gif"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _folder_suffix(source: Path) -> str:
    if source.suffix.lower() in (*OUTPUT_SUFFIXES, *IMAGE_OUTPUT_SUFFIXES):
        return source.suffix
    return ".mkv" if _is_video(source) else ".png"


def upscale_file(
    path: Path,
    output: Path,
    arguments: argparse.Namespace,
    watch: Watch | None = None,
    say: Callable[[str], None] = _to_stderr,
) -> bool:
    """One video, or one sequence of images.

    Args:
        watch: is told how far it is.
        say: is told how the input is understood, what the output will not hold, and what is damaged.

    Returns:
        Whether it is damaged and `--on-error` is warn.
    """
    source = open_source(path, arguments.fps)
    if not arguments.dry_run and _was_complete(source, output, arguments):
        print(f"{output} was complete already", file=sys.stderr)
        return False
    job = plan(source, output, arguments)
    for line in job.said:
        say(f"{source.name}: {line}")
    if arguments.dry_run:
        print("\n".join(report(fit(job, arguments), arguments)))
        return False
    began = time.perf_counter()
    frames, damage, statistics = (_to_pipe if output == PIPE else _to_files)(job, arguments, watch)
    for line in damage:
        say(f"warning: {path}: {line}")
    seconds = round(time.perf_counter() - began, 3)
    if arguments.stats:
        record = {
            "input": str(path),
            "model": "bicubic" if arguments.bicubic else str(arguments.model),
            "seed": arguments.seed,
            "codec": arguments.codec,
            "frames": frames,
            "width": job.size.output[0],
            "height": job.size.output[1],
            "seconds": seconds,
            **{name: round(value, 3) for name, value in statistics.items()},
            "device": ",".join(arguments.devices) or arguments.device,
            "damage": damage,
        }
        write_atomic(arguments.stats, json.dumps(record, indent=2) + "\n")
    words = f"{output}: {frames} frames of {job.size.output[0]}x{job.size.output[1]} in {seconds} s"
    print(words, file=sys.stderr if output == PIPE else sys.stdout)
    return bool(damage) and arguments.on_error == "warn"


def _to_files(job: Job, arguments: argparse.Namespace, watch: Watch | None) -> tuple[int, list[str], dict[str, float]]:
    """Number of frames, damage of the input, statistics."""
    tracks_from = None if arguments.start or arguments.frames else job.source.file
    sound = sound_damage(tracks_from, job.tracks) if tracks_from else []
    if sound and arguments.on_error == "stop":
        raise UserError(f"{tracks_from}: {sound[0]}; --on-error keep goes on")
    with only_job(job.output):
        identity = job_identity(arguments, job.source) | {"encoder": job.codec, "bit_depth": job.bit_depth}
        parts = VideoParts(job.output, identity, arguments.part_frames, restart=arguments.restart, images=job.images)
        done, statistics = False, parts.statistics
        try:
            parts.begin()
            if parts.complete:
                print(f"resuming after {parts.frames} frames", file=sys.stderr)
            if parts.sizes:
                job = resumed(job, parts.sizes)
            elif not arguments.bicubic:
                job = fit(job, arguments)
                parts.keep_sizes(record(job))
            if not parts.complete:
                black = np.zeros(
                    (1, *(side * SCALE for side in reversed(job.size.model_input)), 4 if job.alpha else 3), np.uint8
                )
                if warning := disk_warning(job, arguments):
                    print(f"{job.output}: {warning}", file=sys.stderr)
                rehearse(parts, tracks_from, job.tracks, writer_of(job, arguments), black, job.codec)
            upscale_parts(
                parts, job, arguments, statistics,
                lambda tiling: parts.keep_sizes(record(replace(job, tiling=tiling))), watch,
            )  # fmt: skip
            if not parts.frames:
                raise nothing_to_write(job.source, job.frame_rate, arguments)
            times, last_s = finish(parts, tracks_from, job.tracks, job.info, job.frame_rate)
            done = True
        except KeyboardInterrupt:
            if parts.complete and not job.source.piped:
                print(f"interrupted after {parts.frames} frames; the same command resumes", file=sys.stderr)
            raise
        finally:
            parts.leave(done=done or job.source.piped is not None)
    damage = damage_of(parts.errors, parts.frames, times[-1] + last_s if times else None, job, arguments)
    return parts.frames, damage + sound, statistics


def _to_pipe(job: Job, arguments: argparse.Namespace, watch: Watch | None) -> tuple[int, list[str], dict[str, float]]:
    """The same for standard output."""
    statistics: dict[str, float] = {}
    with only_video_on_stdout() as pipe:
        reader = write_to_pipe(fit(job, arguments), arguments, statistics, pipe)
    if not reader.count:
        raise nothing_to_write(job.source, job.frame_rate, arguments)
    errors = list(dict.fromkeys(reader.errors))
    return reader.count, damage_of(errors, reader.count, None, job, arguments), statistics


@contextmanager
def only_video_on_stdout() -> Iterator[int]:
    """A descriptor of standard output; what anything else writes there goes to standard error meanwhile."""
    sys.stdout.flush()
    pipe = os.dup(1)
    os.dup2(2, 1)
    try:
        yield pipe
    finally:
        sys.stdout.flush()
        os.dup2(pipe, 1)
        os.close(pipe)


def _was_complete(source: Source, output: Path, arguments: argparse.Namespace) -> bool:
    """Whether this job was killed between its last act and its clean-up, which is done now."""
    if only_lock_left(output):
        with only_job(output):  # takes the folder away
            pass
    if arguments.overwrite or arguments.restart or not was_finished(output, job_identity(arguments, source)):
        return False
    with only_job(output):
        delete_parts(output)
    return True


if __name__ == "__main__":
    run_command(main)
