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
from common.scale import SCALE
from common.seeding import derive_seed
from datagen.degradation.operation import Drawn, HrShape, choose
from datagen.degradation.recipe import Mixture, Recipe, StageRecipe, mixture
from datagen.degradation.registry import OPERATIONS, find_operation


def degrade_clip(hr: np.ndarray, recipe: Recipe | Mixture | str, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Draw a degradation and apply it.

    Args:
        hr: uint8 (F, H, W, 3) RGB, sides multiples of 4.
        recipe: a recipe, a mixture to draw one from, or a name of `recipe.PRESETS` or `mixture`.
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
        name = choose(_generator(seed, "recipe"), recipe.weights)
        recipe = recipe.recipe(name)
    draws = draw_operations(recipe, hr.shape, seed)
    return apply_operations(hr, draws, seed), {"seed": seed, "recipe": name, "operations": draws}


def draw_operations(recipe: Recipe, shape: tuple[int, ...], seed: int) -> list[Drawn]:
    """The operations of a clip of `shape` (F, H, W, 3) in the order they are applied."""
    rng = _generator(seed, "draws")
    hr = HrShape(*shape[:3])

    def draw(name: str, config: Any, generator: np.random.Generator = rng) -> list[Drawn]:
        drawn = find_operation(name).draw(config, hr, generator)
        return [] if drawn is None else [{"op": name, **drawn}]

    def stage(ranges: StageRecipe) -> list[Drawn]:
        names = ("blur", "resize", "noise", "jpeg")
        return [drawn for name in names for drawn in draw(name, getattr(ranges, name))]

    def extra(place: str) -> list[Drawn]:
        return [
            drawn
            for index, entry in enumerate(recipe.extra)
            if entry.after == place
            for drawn in draw(entry.operation, entry.section(), _generator(seed, f"extra draws {index}"))
        ]

    draws = draw("sharpen", recipe.sharpen) if recipe.sharpen else []
    draws += extra("sharpen") + stage(recipe.first) + extra("first")
    draws += draw("codec", recipe.codec) + extra("codec")
    draws += stage(recipe.second) + extra("second")
    last = [
        draw("codec", recipe.codec),
        draw("resize_to_target", recipe.second.resize) + draw("blur", recipe.final_sinc),
    ]
    if rng.random() < 0.5:
        last.reverse()
    return draws + last[0] + last[1] + extra("last")


def apply_operations(hr: np.ndarray, draws: list[Drawn], seed: int) -> np.ndarray:
    """LR, uint8 (F, H/4, W/4, 3), from drawn operations; `seed` fixes the noise."""
    rng = _generator(seed, "noise")
    target = (hr.shape[1] // SCALE, hr.shape[2] // SCALE)
    # BGR within: what OpenCV's JPEG expects
    frames = [np.ascontiguousarray(frame[..., ::-1]) for frame in hr]
    for index, drawn in enumerate(draws):
        own = rng if drawn["op"] in OPERATIONS else _generator(seed, f"extra noise {index}")
        frames = find_operation(drawn["op"]).apply(drawn, frames, target, own)
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
        raise UserError(f"{arguments.input} is {hr.shape[2]}x{hr.shape[1]}: too small for --crop {height}x{width}")
    hr = hr[:, top : top + height, left : left + width]
    lr, draws = degrade_clip(hr, arguments.preset, arguments.seed)
    write_lossless(arguments.output, lr)
    if arguments.hr_output:
        write_lossless(arguments.hr_output, hr)
    arguments.output.with_suffix(".json").write_text(json.dumps(draws, indent=1) + "\n")
    print(f"{arguments.output}: {len(lr)} frames of {lr.shape[2]}x{lr.shape[1]}, recipe {draws['recipe']}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m datagen.degradation.degrade", description="Degrade a clip once, with a seed that is recorded."
    )
    parser.add_argument("input", type=Path, help="HR video")
    parser.add_argument("output", type=Path, help="LR video, lossless; the draws go beside it as JSON")
    parser.add_argument("--preset", default="realbasicvsr", help="realbasicvsr, mild, light, static or mixture")
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
