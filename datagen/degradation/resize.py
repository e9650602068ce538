"""Resize by a factor that walks from frame to frame, and the resize to the LR clip's size."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

from common.config import Section
from datagen.degradation.operation import Drawn, Frames, HrShape, Operation, Probability, Range, choose, listed, walk

Interpolation = Literal["bilinear", "area", "bicubic"]
INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}


class ResizeConfig(Section):
    """One of up, down, keep per clip; the factor walks from frame to frame [peer: RealBasicVSR]."""

    #: weight of enlarging
    up: Probability = 0.2
    #: weight of shrinking
    down: Probability = 0.7
    #: weight of starting at the clip's own size
    keep: Probability = 0.1
    #: factor of height and width
    factor: Range = (0.15, 1.5)
    #: largest change of the factor per frame
    factor_step: float = 0.015
    #: each clip draws one, all with the same weight
    interpolations: tuple[Interpolation, ...] = ("bilinear", "area", "bicubic")


class Resize(Operation):
    """Up, down or keep."""

    name = "resize"
    config = ResizeConfig

    def draw(self, config: ResizeConfig, shape: HrShape, rng: np.random.Generator) -> Drawn:
        interpolation = str(rng.choice(config.interpolations))
        direction = choose(rng, {"up": config.up, "down": config.down, "keep": config.keep})
        low, high = config.factor
        start = {"up": rng.uniform(1, max(1, high)), "down": rng.uniform(min(1, low), 1), "keep": 1.0}[direction]
        factor = walk(rng, config.factor, config.factor_step, shape.frames, start)
        return {"interpolation": interpolation, "direction": direction, "factor": listed(factor)}

    def apply(self, drawn: Drawn, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
        height, width = frames[0].shape[:2]
        resized = []
        for frame, factor in zip(frames, drawn["factor"], strict=True):
            # factors refer to the clip's size, not to each frame's; even sizes, as in the reference
            size = [max(2, 2 * int(side * factor / 2)) for side in (width, height)]
            resized.append(cv2.resize(frame, size, interpolation=INTERPOLATIONS[drawn["interpolation"]]))
        return resized


class ResizeToTarget(Operation):
    """To the size of the LR clip, with one of the same interpolations."""

    name = "resize_to_target"
    config = ResizeConfig

    def draw(self, config: ResizeConfig, shape: HrShape, rng: np.random.Generator) -> Drawn:
        return {"interpolation": str(rng.choice(config.interpolations))}

    def apply(self, drawn: Drawn, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
        interpolation = INTERPOLATIONS[drawn["interpolation"]]
        return [cv2.resize(frame, target[::-1], interpolation=interpolation) for frame in frames]
