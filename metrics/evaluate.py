"""Score videos and write a table.

    python -m metrics.evaluate --video OUT --reference HR --output metrics.json
    python -m metrics.evaluate --video OUT --reference HR --output metrics.json \
        --metrics weight-free --niqe-model niqe.safetensors
    python -m metrics.evaluate --video OUT --reference HR --output metrics.json --metrics psnr,my_package.vmaf:Vmaf

OUT and HR are clips (metrics/clips.py) or folders of clips paired by name. Frames are streamed: a clip's length does
not show in memory. metrics.json holds every clip's scores, their means, and what produced them. Scores are kept in
--cache under what they depend on: a killed run goes on when the command is run again. Several methods on several sets:
metrics.compare.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from common.atomic import write_atomic
from common.command_line import add_config_options, load_sections
from common.errors import UserError, run_command
from common.progress import progress
from common.storage import StorageConfig, local_copy
from common.video_probe import VIDEO_SUFFIXES
from metrics.clips import find_clips
from metrics.frame_metric import Metric
from metrics.kept_scores import KeptScores
from metrics.published import load_published
from metrics.registry import METRICS, SETS, create_all, find_metric, resolve_names
from metrics.scoring import Score, protocol, versions
from metrics.scoring_options import add_scoring_options, metric_settings

#: columns of published tables that are no metric of ours
_OTHER_LABELS = {"seconds": "s", "parameters_b": "B"}


def evaluate(
    videos: dict[str, Path], references: dict[str, Path] | None, metrics: list[Metric], kept: KeptScores
) -> dict[str, dict[str, Score]]:
    """Scores by clip name; see `KeptScores` for what is not computed again.

    Raises:
        UserError: a clip without its reference, or of another size than its reference.
    """
    scores = {}
    with progress(len(videos), "scoring", "clips") as bar:
        for name, path in videos.items():
            scores[name] = kept.score(path, references[name] if references else None, metrics)
            bar.advance(1)
    return scores


def mean_scores(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean over clips of every metric."""
    names = next(iter(scores.values()))
    return {name: math.fsum(clip[name] for clip in scores.values()) / len(scores) for name in names}


def pair_clips(videos: Path, references: Path | None) -> tuple[dict[str, Path], dict[str, Path] | None]:
    """Clips to score and, by the same names, their references; a single clip pairs with a single reference.

    Raises:
        UserError: naming the clips without a reference.
    """
    found = find_clips(videos)
    if references is None:
        return found, None
    targets = find_clips(references)
    if len(found) == len(targets) == 1:
        targets = {next(iter(found)): next(iter(targets.values()))}
    missing = sorted(set(found) - set(targets))
    if missing:
        raise UserError(f"{references} has no clip named {', '.join(missing[:3])}: pairs have the same name")
    return found, targets


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write `document` atomically."""
    write_atomic(path, json.dumps(document, indent=2) + "\n")


def _heading(metric: type[Metric]) -> str:
    return f"{metric.label} {'↓' if metric.lower_is_better else '↑'}"


def _table(title: str, rows_are: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column(rows_are, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _print_scores(
    console: Console, scores: dict[str, dict[str, float]], means: dict[str, float], metrics: list[Metric]
) -> None:
    table = _table("measured", "clip", [_heading(type(metric)) for metric in metrics])
    for clip, values in scores.items():
        table.add_row(clip, *(f"{values[name]:.4f}" for name in means))
    if len(scores) > 1:
        table.add_section()
        table.add_row("mean", *(f"{value:.4f}" for value in means.values()))
    console.print(table)


def _print_published(console: Console) -> None:
    published = load_published()
    for printed in published.tables:
        columns = list(next(iter(printed.rows.values())))
        headings = [_heading(METRICS[name]) if name in METRICS else _OTHER_LABELS.get(name, name) for name in columns]
        table = _table(printed.title, "method", headings)
        for method, values in printed.rows.items():
            table.add_row(method, *(f"{values[name]:g}" for name in columns))
        console.print(table)
    console.print(f"{published.label}. {published.note}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score videos.")
    parser.add_argument("--video", required=True, help="clip, or folder of clips, to score; local or s3://")
    parser.add_argument("--reference", help="HR clip, or folder of HR clips with the same names; local or s3://")
    add_scoring_options(parser)
    add_config_options(parser, required=False)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--cache", type=Path, help="folder of kept scores; default: OUTPUT with the suffix .cache")
    parser.add_argument("--published", action="store_true", help="also print the figures the authors published")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    for override in arguments.overrides:
        if override in SETS:
            raise UserError(f"--set {override}: a set of metrics is given with --metrics: write --metrics {override}")
    (storage,) = load_sections(arguments, storage=StorageConfig)
    names = resolve_names(arguments.metrics)
    settings = metric_settings(arguments)
    needing = [name for name in names if find_metric(name).needs_reference]
    if needing and arguments.reference is None:
        raise UserError(f"{', '.join(needing)} compare with the HR clip: add --reference")
    metrics = create_all(names, settings)
    cache = arguments.cache or arguments.output.with_suffix(".cache")
    kept = KeptScores(cache, arguments.max_frames, arguments.crop_border)
    with ExitStack() as stack:
        local = [
            stack.enter_context(local_copy(address, storage)) if address else None
            for address in (arguments.video, arguments.reference)
        ]
        assert local[0] is not None
        videos, references = pair_clips(local[0], local[1])
        found = evaluate(videos, references, metrics, kept)
    kept.report()
    scores = {clip: {name: score.value for name, score in values.items()} for clip, values in found.items()}
    means = mean_scores(scores)
    left_out = {
        clip: {name: score.left_out for name, score in values.items() if score.left_out}
        for clip, values in found.items()
        if any(score.left_out for score in values.values())
    }

    write_json(
        arguments.output,
        {
            "metrics": means,
            "clips": scores,
            "lower_is_better": {metric.name: metric.lower_is_better for metric in metrics},
            "video": arguments.video,
            "reference": arguments.reference,
            "max_frames": arguments.max_frames,
            "crop_border": arguments.crop_border,
            "left_out": left_out,
            "protocols": [protocol(metric) for metric in metrics],
            "versions": versions(),
        },
    )
    console = Console()
    _print_scores(console, scores, means, metrics)
    for clip, counts in left_out.items():
        console.print(f"{clip}: frames left out of the mean, flat or without a visible pixel: {counts}")
    if any(path.suffix.lower() in VIDEO_SUFFIXES for path in videos.values()):
        console.print(
            "Video files are scored as they decode: for comparable figures give frames before a lossy encode."
        )
    if arguments.published:
        _print_published(console)
    console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    run_command(main)
