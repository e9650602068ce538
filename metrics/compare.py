"""Compare methods on sets of clips: one table of means, intervals and paired differences.

    python -m metrics.compare --method bicubic=out/bicubic --method ours=out/ours \
        --set SPMCS=data/SPMCS/HR --set VideoLQ --metrics psnr,ssim,lpips,niqe --output compare/

A method's clips lie in FOLDER/SET/, or in FOLDER where there is one set; they are paired with the HR clips by name
(metrics/clips.py). A set without HR clips is named alone, and only no-reference metrics are computed on it. Beside a
method's folder, FOLDER.method.yaml may hold `seconds` and `parameters_b`. Any FOLDER may be an s3:// prefix.

Written are compare.md, .tex, .csv and .json. Scores are kept in --cache under what they depend on: a killed run goes on
when the command is run again, and a new method, set or metric costs only itself.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from common.atomic import write_atomic
from common.config import load_section
from common.errors import UserError, run_command
from common.progress import progress
from common.storage import StorageConfig, local_copy
from metrics.bootstrap import RESAMPLES
from metrics.comparison.clip_sets import EXPECTED_CLIPS, ComparedSet, gather_sets, parse_methods
from metrics.comparison.summary import Row
from metrics.comparison.tables import Comparison, comma_separated, latex, markdown
from metrics.frame_metric import Metric
from metrics.kept_scores import KeptScores
from metrics.registry import create_all, resolve_names
from metrics.scoring import Score, protocol, versions
from metrics.scoring_options import add_scoring_options, metric_settings

#: [method][clip][metric]
SetScores = dict[str, dict[str, dict[str, Score]]]


def score_sets(sets: list[ComparedSet], metrics: list[Metric], kept: KeptScores) -> dict[str, SetScores]:
    """Every score of every set; see `KeptScores` for what is not computed again."""
    scores: dict[str, SetScores] = {}
    total = sum(len(clip_set.videos) * len(clip_set.clips) for clip_set in sets)
    with progress(total, "scoring", "clips") as counter:
        for clip_set in sets:
            wanted = usable(clip_set, metrics)
            found = scores.setdefault(clip_set.name, {})
            for method, videos in clip_set.videos.items():
                found[method] = {}
                for clip in clip_set.clips:
                    reference = clip_set.references[clip] if clip_set.references else None
                    found[method][clip] = kept.score(videos[clip], reference, wanted)
                    counter.advance(1)
    return scores


def usable(clip_set: ComparedSet, metrics: list[Metric]) -> list[Metric]:
    """The metrics that the set can be scored by.

    Raises:
        UserError: none.
    """
    found = [metric for metric in metrics if clip_set.references is not None or not metric.needs_reference]
    if not found:
        names = ", ".join(metric.name for metric in metrics)
        raise UserError(f"{clip_set.name} has no HR clips, and {names} need them: add a no-reference metric, as niqe")
    return found


def rows(sets: list[ComparedSet], metrics: list[Metric], scores: dict[str, SetScores]) -> list[Row]:
    """One row per set and metric."""
    return [
        Row(
            clip_set.name,
            type(metric),
            {
                method: np.array([clips[clip][metric.name].value for clip in clip_set.clips])
                for method, clips in scores[clip_set.name].items()
            },
        )
        for clip_set in sets
        for metric in usable(clip_set, metrics)
    ]


def document(comparison: Comparison, scores: dict[str, SetScores], metrics: list[Metric]) -> dict[str, Any]:
    """compare.json."""
    base = comparison.reference_method
    results = [
        {
            "set": row.set_name,
            "metric": row.metric.name,
            "lower_is_better": row.metric.lower_is_better,
            "methods": {
                name: {
                    **row.mean(name)._asdict(),
                    "mark": mark,
                    f"difference_to_{base}": row.difference(name, base)._asdict(),
                }
                for name, mark in row.marks().items()
            },
        }
        for row in comparison.rows
    ]
    return {
        "legend": comparison.legend(),
        "reference_method": base,
        "resamples": RESAMPLES,
        "results": results,
        "methods": {m.name: {"folder": m.address, **m.facts.model_dump()} for m in comparison.methods},
        "sets": {
            clip_set.name: {"clips": clip_set.clips, "expected": clip_set.expected, "missing": clip_set.missing}
            for clip_set in comparison.sets
        },
        "per_clip": _nested(scores, lambda score: score.value),
        "left_out": _nested(scores, lambda score: score.left_out),
        "protocols": [protocol(metric) for metric in metrics],
        "versions": versions(),
    }


def _nested(scores: Any, value: Any) -> Any:
    if isinstance(scores, Score):
        return value(scores)
    return {name: _nested(inner, value) for name, inner in scores.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare methods on sets of clips.")
    parser.add_argument("--method", action="append", required=True, metavar="NAME=FOLDER", help="repeatable")
    counts = ", ".join(f"{name} {count}" for name, count in EXPECTED_CLIPS.items())
    parser.add_argument(
        "--set",
        action="append",
        required=True,
        metavar="NAME[=HR_FOLDER]",
        help=f"repeatable; clips that are expected: {counts}",
    )
    add_scoring_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--cache", type=Path, help="folder of kept scores; default: OUTPUT/cache")
    parser.add_argument("--config", type=Path, help="preset whose section storage says how s3:// is reached")
    parser.add_argument("--reference-method", help="differences are to this method; default: the first")
    parser.add_argument("--allow-missing", action="store_true", help="compare only the clips that all methods have")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    metrics = create_all(resolve_names(arguments.metrics), metric_settings(arguments))
    kept = KeptScores(arguments.cache or arguments.output / "cache", arguments.max_frames, arguments.crop_border)
    storage = load_section(arguments.config, "storage", StorageConfig)
    with ExitStack() as stack:

        def place(address: str) -> Path:
            return stack.enter_context(local_copy(address, storage))

        methods = parse_methods(arguments.method, place)
        base = arguments.reference_method or methods[0].name
        if base not in [method.name for method in methods]:
            raise UserError(f"--reference-method {base}: choose {', '.join(method.name for method in methods)}")
        sets = gather_sets(arguments.set, methods, place, allow_missing=arguments.allow_missing)
        scores = score_sets(sets, metrics, kept)
    kept.report()

    comparison = Comparison(methods, sets, rows(sets, metrics, scores), base)
    result = {
        **document(comparison, scores, metrics),
        "crop_border": arguments.crop_border,
        "max_frames": arguments.max_frames,
    }
    write_atomic(arguments.output / "compare.json", json.dumps(result, indent=1) + "\n")
    write_atomic(arguments.output / "compare.csv", comma_separated(comparison))
    write_atomic(arguments.output / "compare.tex", latex(comparison))
    write_atomic(arguments.output / "compare.md", markdown(comparison))
    print(markdown(comparison))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    run_command(main)
