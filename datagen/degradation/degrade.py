"""Degrade a clip: HR in, LR at a quarter of its size out, with every draw on record.

    python -m datagen.degradation.degrade in.mp4 out.mp4 --preset mixture --seed 0 [--frames N] [--start S] [--crop HxW]

A degradation is drawn first, as a list of operations with one value per frame, then applied; so LR is reproducible to
the bit from (HR clip, seed, recipe), or from (HR clip, seed, draws), by the same versions of OpenCV and FFmpeg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, run_command
from common.seeding import derive_seed
from datagen.degradation import operations
from datagen.degradation.operations import Operation
from datagen.degradation.recipe import Mixture, Recipe, StageRecipe, mixture

#: HR is this many times as wide and as high as LR [paper]
SCALE = 4


def degrade_clip(
    hr: np.ndarray, recipe: Recipe | Mixture | str, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Draw a degradation and apply it.

    Args:
        hr: uint8 (F, H, W, 3) RGB, sides multiples of 4.
        recipe: a recipe, a mixture to draw one from, or a preset's name (`realbasicvsr`, `mild`, `static`, `mixture`).
        seed: fixes everything.

    Returns:
        LR, uint8 (F, H/4, W/4, 3), and the draws, JSON-able: seed, recipe name, operations.

    Raises:
        UserError: a clip of another type or shape.
    """
    if hr.dtype != np.uint8 or hr.ndim != 4 or hr.shape[3] != 3 or hr.shape[1] % SCALE or hr.shape[2] % SCALE:
        raise UserError(
            f"degrade_clip takes uint8 (F, H, W, 3) with sides that are multiples of {SCALE}, not {hr.dtype} {hr.shape}"
        )
    name = "custom"
    if isinstance(recipe, str):
        recipe = mixture(recipe)
    if isinstance(recipe, Mixture):
        name = operations.choose(_generator(seed, "recipe"), recipe.weights)
        recipe = recipe.recipe(name)
    draws = draw_operations(recipe, hr.shape, seed)
    return apply_operations(hr, draws, seed), {"seed": seed, "recipe": name, "operations": draws}


def draw_operations(recipe: Recipe, shape: tuple[int, ...], seed: int) -> list[Operation]:
    """The operations of a clip of `shape` (F, H, W, 3) in the order they are applied."""
    rng = _generator(seed, "draws")
    frames, pixels = shape[0], shape[1] * shape[2]

    def stage(ranges: StageRecipe) -> list[Operation | None]:
        return [
            operations.draw_blur(ranges.blur, frames, rng),
            operations.draw_resize(ranges.resize, frames, rng),
            operations.draw_noise(ranges.noise, frames, rng),
            operations.draw_jpeg(ranges.jpeg, frames, rng),
        ]

    drawn: list[Operation | None] = [operations.draw_sharpen(recipe.sharpen)] if recipe.sharpen else []
    drawn += stage(recipe.first)
    drawn.append(operations.draw_codec(recipe.codec, pixels, rng))
    drawn += stage(recipe.second)
    last: list[list[Operation | None]] = [
        [operations.draw_codec(recipe.codec, pixels, rng)],
        [
            operations.draw_resize_to_target(recipe.second.resize, rng),
            operations.draw_blur(recipe.final_sinc, frames, rng),
        ],
    ]
    if rng.random() < 0.5:
        last.reverse()
    return [operation for operation in drawn + last[0] + last[1] if operation is not None]


def apply_operations(hr: np.ndarray, draws: list[Operation], seed: int) -> np.ndarray:
    """LR, uint8 (F, H/4, W/4, 3), from drawn operations; `seed` fixes the noise."""
    rng = _generator(seed, "noise")
    target = (hr.shape[1] // SCALE, hr.shape[2] // SCALE)
    frames = [
        np.ascontiguousarray(frame[..., ::-1]) for frame in hr
    ]  # BGR within: what OpenCV's JPEG expects
    for operation in draws:
        frames = operations.apply(operation, frames, target, rng)
    return np.ascontiguousarray(np.stack(frames)[..., ::-1])


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(derive_seed("degradation", seed, purpose)))


def main() -> None:
    from common.lossless_clip import read_window, write_lossless

    arguments = _arguments()
    hr = read_window(arguments.input, arguments.start, arguments.frames)
    height, width = arguments.crop or (hr.shape[1] // SCALE * SCALE, hr.shape[2] // SCALE * SCALE)
    top, left = (hr.shape[1] - height) // 2, (hr.shape[2] - width) // 2
    if top < 0 or left < 0:
        raise UserError(
            f"{arguments.input} is {hr.shape[2]}x{hr.shape[1]}: too small for --crop {height}x{width}"
        )
    hr = hr[:, top : top + height, left : left + width]
    lr, draws = degrade_clip(hr, arguments.preset, arguments.seed)
    write_lossless(arguments.output, lr)
    if arguments.hr_output:
        write_lossless(arguments.hr_output, hr)
    arguments.output.with_suffix(".json").write_text(json.dumps(draws, indent=1) + "\n")
    print(f"{arguments.output}: {len(lr)} frames of {lr.shape[2]}x{lr.shape[1]}, recipe {draws['recipe']}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m datagen.degradation.degrade",
        description="Degrade a clip once, with a seed that is recorded.",
    )
    parser.add_argument("input", type=Path, help="HR video")
    parser.add_argument("output", type=Path, help="LR video, lossless; the draws go beside it as JSON")
    parser.add_argument("--preset", default="realbasicvsr", help="realbasicvsr, mild, static or mixture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="first frame")
    parser.add_argument("--frames", type=int, help="number of frames; default: to the end")
    parser.add_argument("--crop", type=_size, metavar="HxW", help="centre crop of HR, multiples of 4")
    parser.add_argument("--hr-output", type=Path, help="also write the HR clip, lossless")
    return parser.parse_args()


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH") from None
    if height % SCALE or width % SCALE or min(height, width) <= 0:
        raise argparse.ArgumentTypeError(f"{text}: both sides must be positive multiples of {SCALE}")
    return height, width


if __name__ == "__main__":
    run_command(main)
