"""`make`: the methods' clips, re-encoded two and two into files that name nothing, and the key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.atomic import write_atomic
from common.errors import UserError
from common.progress import progress
from common.seeding import derive_seed
from common.video_probe import VIDEO_SUFFIXES, probe
from common.video_writer import VideoWriter
from metrics.clips import Clip, find_clips, open_clip
from preference.study.store import CLIPS, KEY
from preference.study.trials import Pair, Study

#: panels begin at a multiple of a macroblock, px, so that no block holds two of them
_BLOCK = 16
#: rows of repeated edge between panels: x264's deblocking filter reaches over 3
_MARGIN = 8
#: lossy and equal for all methods: browsers play 4:2:0 only. Much finer than what is hard to tell from the source
#: (common/encoders.py) [ours]
_CRF = 10
#: a key frame each half second at 24 frames/s, so that single frames are reached at once [ours]
_OPTIONS = {"preset": "medium", "g": "12"}

#: the LR clips' name among the methods
_INPUT = "the input"

Frames = NDArray[np.uint8]


def make_study(
    methods: Mapping[str, Path],
    inputs: Path,
    output: Path,
    *,
    seed: int = 0,
    trials_per_rater: int | None = None,
    every_two: bool = False,
    frame_rate: Fraction | None = None,
) -> Study:
    """Write the videos and, last, `key.json`. A killed run goes on at the first video that is missing.

    Args:
        methods: name -> folder of clips, as `metrics.compare` reads them. The first one is the reference.
        inputs: folder of the LR clips.
        trials_per_rater: None: every rater sees all pairs.
        every_two: compare every two methods, not only the first one with each other one.
        frame_rate: None: that of the first method's videos, or 25 for frames.

    Raises:
        UserError: fewer than two methods, clips that one method lacks, or of different sizes or lengths; a study
            already there.
    """
    if len(methods) < 2:
        raise UserError("a study compares methods: give --method NAME=FOLDER at least twice")
    if (output / KEY).exists():
        raise UserError(f"{output} holds a study already; choose another --output")
    clips = _same_clips({**methods, _INPUT: inputs})
    two = list(combinations(methods, 2)) if every_two else [(next(iter(methods)), name) for name in list(methods)[1:]]
    rate = frame_rate or _frame_rate(next(iter(clips.values()))[next(iter(methods))])
    pairs = []
    with progress(len(two) * len(clips), "encoding pairs", "pairs") as bar:
        for name, paths in clips.items():
            opened = {method: open_clip(path) for method, path in paths.items()}
            _check(name, opened)
            prints = {method: clip.fingerprint() for method, clip in opened.items()}
            for reference, other in two:
                top, below = (reference, other) if derive_seed("top", seed, name, other) % 2 else (other, reference)
                shown = [top, below, _INPUT]
                identity = derive_seed("file", seed, rate, *(prints[method] for method in shown))
                rows = _rows([opened[method].size.height for method in shown])
                size, low = opened[top].size, opened[_INPUT].size
                pair = Pair(
                    clip=name, reference=reference, other=other, file=f"{identity:016x}.mp4", top=top,
                    width=size.width, height=size.height, second_row=rows[1], input_row=rows[2],
                    input_size=(low.width, low.height), frames=size.frames,
                )  # fmt: skip
                _encode([opened[method] for method in shown], rows, output / CLIPS / pair.file, rate)
                pairs.append(pair)
                bar.advance(1)
    identity = derive_seed("study", seed, *(f"{pair.file} {pair.reference} {pair.other}" for pair in pairs))
    study = Study(f"{identity:016x}", seed, trials_per_rater, str(rate), tuple(pairs))
    write_atomic(output / KEY, json.dumps(study.document(), indent=2) + "\n")
    return study


def _same_clips(folders: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """Clip -> method -> path."""
    found = {method: find_clips(folder) for method, folder in folders.items()}
    names = set().union(*found.values())
    for method, clips in found.items():
        if missing := sorted(names - clips.keys()):
            raise UserError(f"{method} ({folders[method]}) has no clip {missing[0]}, which others have")
    return {name: {method: clips[name] for method, clips in found.items()} for name in sorted(names)}


def _check(name: str, clips: Mapping[str, Clip]) -> None:
    """Clips of one name are as long as each other, and as large but for the input."""
    first, *others = clips.items()
    for method, clip in others:
        a, b = clip.size, first[1].size
        if a.frames != b.frames or (method != _INPUT and a != b):
            raise UserError(f"clip {name}: {first[0]} is {first[1].size}, {method} is {clip.size}")


def _rows(heights: list[int]) -> list[int]:
    """Row at which each panel begins, and the end."""
    rows = [0]
    for height in heights:
        rows.append(-(-(rows[-1] + height + _MARGIN) // _BLOCK) * _BLOCK)
    return rows


def _encode(clips: list[Clip], rows: list[int], path: Path, rate: Fraction) -> None:
    """Panels below each other, from decoded frames: what the source files said of themselves is not copied."""
    if path.exists():
        return
    width = max(clip.size.width for clip in clips)
    options = {"codec": "h264", "crf": _CRF, "encoder_options": _OPTIONS}
    with VideoWriter(path, width=width, height=rows[-1], frame_rate=rate, **options) as writer:  # type: ignore[arg-type]
        for frames in zip(*map(_frames, clips), strict=True):
            panels = []
            for frame, (start, end) in zip(frames, pairwise(rows), strict=True):
                more = (end - start - frame.shape[0], width - frame.shape[1])
                panels.append(np.pad(frame, ((0, more[0]), (0, more[1]), (0, 0)), mode="edge"))
            writer.write(np.concatenate(panels)[None])


def _frames(clip: Clip) -> Iterator[Frames]:
    for frame in clip.read():
        if frame.dtype == np.uint8:
            yield frame.astype(np.uint8, copy=False)
        else:
            scale = 255 / 65535 if frame.dtype == np.uint16 else 255
            yield np.rint(frame * scale).astype(np.uint8)


def _frame_rate(path: Path) -> Fraction:
    return probe(path).frame_rate if path.suffix.lower() in VIDEO_SUFFIXES else Fraction(25)
