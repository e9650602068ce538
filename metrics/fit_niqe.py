"""Fit a NIQE model on HR clips, for frames the authors' prior does not suit (small ones, other content).

python -m metrics.fit_niqe --input HR_DIR --output niqe.safetensors [--block 48]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from common.errors import UserError, run_command
from common.progress import progress
from metrics.clips import find_clips, open_clip
from metrics.luma import luma
from metrics.niqe import OFFICIAL_BLOCK, NiqeModel, gaussian
from metrics.niqe_features import FEATURES, OFFICIAL_SHARPNESS, sharp_block_features

# a covariance of 36 features from fewer blocks than this has no meaning
_FEWEST_BLOCKS = 2 * FEATURES


def fit_niqe(
    clips: Iterable[Iterable[Tensor]],
    block: int = OFFICIAL_BLOCK,
    *,
    frame_step: int = 1,
    sharpness: float = OFFICIAL_SHARPNESS,
) -> tuple[NiqeModel, int]:
    """Gaussian over the sharp blocks of `clips`, each the frames of a clip, float32 (3, H, W) in [0, 1].

    Args:
        frame_step: only every n-th frame is used; neighbours say nearly the same.
        sharpness: a block is used if it is sharper than this share of its frame's sharpest block.

    Returns:
        The model and the number of blocks it was fitted on.

    Raises:
        UserError: too few blocks with contrast.
    """
    parts = [
        sharp_block_features(np.round(luma(frame)), block, sharpness)
        for clip in clips
        for frame in islice(clip, 0, None, frame_step)
    ]
    features = np.concatenate(parts) if parts else np.empty((0, FEATURES))
    features = features[~np.isnan(features).any(axis=1)]
    if len(features) < _FEWEST_BLOCKS:
        raise UserError(
            f"only {len(features)} sharp blocks of {block} px found, a NIQE model needs {_FEWEST_BLOCKS}; "
            "give more clips, a smaller --block or a lower --sharpness"
        )
    mean, covariance = gaussian(features)
    return NiqeModel(mean, covariance, block), len(features)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a NIQE model on HR clips.")
    parser.add_argument("--input", type=Path, required=True, help="clip, or folder of HR clips")
    parser.add_argument("--output", type=Path, required=True, help="model file to write (.safetensors)")
    parser.add_argument("--block", type=int, default=OFFICIAL_BLOCK, help="side of a block in px, even")
    parser.add_argument("--frame-step", type=int, default=1, help="use every n-th frame")
    parser.add_argument(
        "--sharpness",
        type=float,
        default=OFFICIAL_SHARPNESS,
        help="use blocks sharper than this share of their frame's sharpest one",
    )
    arguments = parser.parse_args()
    if arguments.frame_step < 1:
        raise UserError(f"--frame-step {arguments.frame_step} must be at least 1")

    found = find_clips(arguments.input)

    def clips() -> Iterable[Iterable[Tensor]]:
        with progress(len(found), "fitting NIQE", "clips") as bar:
            for path in found.values():
                yield open_clip(path).frames()
                bar.advance(1)

    model, blocks = fit_niqe(clips(), arguments.block, frame_step=arguments.frame_step, sharpness=arguments.sharpness)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    details = {
        "clips": sorted(found),
        "blocks": blocks,
        "frame_step": arguments.frame_step,
        "sharpness": arguments.sharpness,
    }
    model.save(arguments.output, details)
    print(f"fitted on {blocks} blocks of {arguments.block} px from {len(found)} clips: {arguments.output}")


if __name__ == "__main__":
    run_command(main)
