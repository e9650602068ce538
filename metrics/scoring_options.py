"""Options that metrics.evaluate and metrics.compare share: which metrics, with which weights, on which pixels."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from common.errors import UserError
from metrics.frame_metric import MetricSettings
from metrics.registry import METRICS, SETS

DEFAULT_METRICS = "psnr,ssim"


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    parser.add_argument(
        "--metrics",
        default=DEFAULT_METRICS,
        help=f"a set ({', '.join(SETS)}) or names separated by commas: {', '.join(METRICS)}, or package.module:Class",
    )
    parser.add_argument("--niqe-model", type=Path, help="model of metrics.fit_niqe, for niqe_fitted")
    parser.add_argument("--weights", type=Path, help="folder searched first for weight files")
    parser.add_argument("--max-frames", type=int, help="score only the first frames of every clip")
    parser.add_argument("--crop-border", type=int, default=0, help="px left out on each side of every frame")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def metric_settings(arguments: argparse.Namespace) -> MetricSettings:
    """What metrics are created with.

    Raises:
        UserError: a border or a number of frames outside its range.
    """
    if arguments.crop_border < 0 or (arguments.max_frames is not None and arguments.max_frames < 1):
        raise UserError("--crop-border must be at least 0 and --max-frames at least 1")
    return MetricSettings(arguments.weights, arguments.niqe_model, arguments.device)
