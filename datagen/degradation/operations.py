"""The operations of a degradation: how each is drawn from its recipe and how it is applied to a clip.

A drawn operation is a plain dictionary (`{"op": "noise", "kind": "gaussian", "sigma": [...]}`), which goes into the
sample's metadata as it is; lists hold one value per frame. Applying takes a list of frames, BGR uint8 (H, W, 3), whose
sizes may differ, since the resize factor walks from frame to frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from datagen.degradation.kernels import apply_kernel, gaussian_kernels, sinc_kernels
from datagen.degradation.noise import add_gaussian, add_poisson
from datagen.degradation.recipe import (
    BlurRecipe,
    CodecRecipe,
    JpegRecipe,
    NoiseRecipe,
    Range,
    ResizeRecipe,
    SharpenRecipe,
)
from datagen.degradation.video_compression import through_codec

Operation = dict[str, Any]
Frames = list[np.ndarray]

#: HR pixels at which a recipe's bits per frame hold [peer: RealBasicVSR trains on crops of 256 x 256]
CODEC_REFERENCE_PIXELS = 256 * 256
#: the unsharp mask's blur (sigma 8) and soft mask are computed at this fraction of the resolution
SHARPEN_FRACTION = 4

INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}


def walk(
    rng: np.random.Generator, limits: Range, step: float, frames: int, start: float | None = None
) -> np.ndarray:
    """(F,) values: uniform in `limits` at first (or `start`), then adding U(-step, step) per frame, clipped."""
    values = np.empty(frames)
    values[0] = rng.uniform(*limits) if start is None else start
    for index, change in enumerate(rng.uniform(-step, step, frames - 1), start=1):
        values[index] = np.clip(values[index - 1] + change, *limits)
    return values


def draw_sharpen(recipe: SharpenRecipe) -> Operation:
    return {"op": "sharpen", **recipe.model_dump()}


def draw_blur(recipe: BlurRecipe, frames: int, rng: np.random.Generator) -> Operation | None:
    """None where the probability says so."""
    if rng.random() >= recipe.probability:
        return None
    kind = choose(rng, dict(recipe.weights))
    low, high = recipe.kernel_sizes
    size = int(rng.choice(np.arange(low, high + 1, 2)))
    drawn: Operation = {"op": "blur", "kind": kind, "size": size}
    if kind == "sinc":
        cutoff = recipe.cutoff or (np.pi / 3 if size < 13 else np.pi / 5, np.pi)
        return drawn | {"cutoff": _listed(walk(rng, cutoff, recipe.cutoff_step, frames))}
    drawn["sigma_x"] = _listed(walk(rng, recipe.sigma, recipe.sigma_step, frames))
    if kind.endswith("aniso"):
        drawn["sigma_y"] = _listed(walk(rng, recipe.sigma, recipe.sigma_step, frames))
        drawn["rotation"] = _listed(walk(rng, recipe.rotation, recipe.rotation_step, frames))
    if kind.startswith("generalized"):
        drawn["beta"] = _listed(walk(rng, recipe.beta_generalized, recipe.beta_generalized_step, frames))
    if kind.startswith("plateau"):
        drawn["beta"] = _listed(walk(rng, recipe.beta_plateau, recipe.beta_plateau_step, frames))
    return drawn


def draw_resize(recipe: ResizeRecipe, frames: int, rng: np.random.Generator) -> Operation:
    interpolation = str(rng.choice(recipe.interpolations))
    direction = choose(rng, {"up": recipe.up, "down": recipe.down, "keep": recipe.keep})
    low, high = recipe.factor
    start = {"up": rng.uniform(1, max(1, high)), "down": rng.uniform(min(1, low), 1), "keep": 1.0}[direction]
    factor = walk(rng, recipe.factor, recipe.factor_step, frames, start)
    return {"op": "resize", "interpolation": interpolation, "direction": direction, "factor": _listed(factor)}


def draw_noise(recipe: NoiseRecipe, frames: int, rng: np.random.Generator) -> Operation:
    grey = bool(rng.random() < recipe.grey)
    if rng.random() < recipe.gaussian:
        sigma = walk(rng, recipe.sigma, recipe.sigma_step, frames)
        return {"op": "noise", "kind": "gaussian", "grey": grey, "sigma": _listed(sigma)}
    scale = walk(rng, recipe.poisson_scale, recipe.poisson_scale_step, frames)
    return {"op": "noise", "kind": "poisson", "grey": grey, "scale": _listed(scale)}


def draw_jpeg(recipe: JpegRecipe, frames: int, rng: np.random.Generator) -> Operation:
    quality = np.rint(walk(rng, recipe.quality, recipe.quality_step, frames)).astype(int)
    return {"op": "jpeg", "quality": quality.tolist()}


def draw_codec(recipe: CodecRecipe, hr_pixels: int, rng: np.random.Generator) -> Operation:
    bits = rng.uniform(*recipe.bits_per_frame) * hr_pixels / CODEC_REFERENCE_PIXELS
    codec = choose(rng, dict(recipe.weights))
    return {"op": "codec", "codec": codec, "bits_per_frame": int(bits), "preset": recipe.preset}


def draw_resize_to_target(recipe: ResizeRecipe, rng: np.random.Generator) -> Operation:
    return {"op": "resize_to_target", "interpolation": str(rng.choice(recipe.interpolations))}


def apply(operation: Operation, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
    """The clip after one operation.

    Args:
        target: (height, width) of the LR clip.
        rng: source of the noise's bits; nothing else is random here.
    """
    return _APPLY[operation["op"]](operation, frames, target, rng)


def _sharpen(
    operation: Operation, frames: Frames, target: tuple[int, int], rng: np.random.Generator
) -> Frames:
    size, weight, threshold = operation["kernel_size"], operation["weight"], operation["threshold"]
    return [_sharpen_frame(frame, size, weight, threshold) for frame in frames]


def _sharpen_frame(frame: np.ndarray, size: int, weight: float, threshold: float) -> np.ndarray:
    """Real-ESRGAN's unsharp mask: sharpened where structure is, faded in by the blurred mask of structure."""
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8  # OpenCV's own rule for a Gaussian given by its size
    blurred = _wide_blur(frame, sigma)
    structure = cv2.threshold(cv2.absdiff(frame, blurred), threshold, 255, cv2.THRESH_BINARY)[1]
    fade = _wide_blur(structure, sigma)
    sharp = cv2.addWeighted(frame, 1 + weight, blurred, -weight, 0)
    change = cv2.subtract(sharp, frame, dtype=cv2.CV_16S)
    return cv2.add(frame, cv2.multiply(change, fade, scale=1 / 255, dtype=cv2.CV_16S), dtype=cv2.CV_8U)


def _wide_blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of many px, computed at a fraction of the resolution."""
    height, width = picture.shape[:2]
    small_size = (max(1, width // SHARPEN_FRACTION), max(1, height // SHARPEN_FRACTION))
    small = cv2.resize(picture, small_size, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / SHARPEN_FRACTION)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def _blur(operation: Operation, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
    if operation["kind"] == "sinc":
        kernels = sinc_kernels(operation["size"], np.array(operation["cutoff"]))
    else:
        ones = [1.0] * len(frames)
        kernels = gaussian_kernels(
            operation["kind"],
            operation["size"],
            np.array(operation["sigma_x"]),
            np.array(operation.get("sigma_y", ones)),
            np.array(operation.get("rotation", ones)),
            np.array(operation.get("beta", ones)),
        )
    return [apply_kernel(frame, kernel) for frame, kernel in zip(frames, kernels, strict=True)]


def _resize(
    operation: Operation, frames: Frames, target: tuple[int, int], rng: np.random.Generator
) -> Frames:
    height, width = frames[0].shape[:2]
    resized = []
    for frame, factor in zip(frames, operation["factor"], strict=True):
        # factors refer to the clip's size, not to each frame's; even sizes, as in the reference
        size = [max(2, 2 * int(side * factor / 2)) for side in (width, height)]
        resized.append(cv2.resize(frame, size, interpolation=INTERPOLATIONS[operation["interpolation"]]))
    return resized


def _resize_to_target(
    operation: Operation, frames: Frames, target: tuple[int, int], rng: np.random.Generator
) -> Frames:
    interpolation = INTERPOLATIONS[operation["interpolation"]]
    return [cv2.resize(frame, target[::-1], interpolation=interpolation) for frame in frames]


def _noise(operation: Operation, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
    strengths, add = (
        (operation["sigma"], add_gaussian)
        if operation["kind"] == "gaussian"
        else (operation["scale"], add_poisson)
    )
    return [
        add(frame, strength, operation["grey"], rng)
        for frame, strength in zip(frames, strengths, strict=True)
    ]


def _jpeg(operation: Operation, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
    compressed = []
    for frame, quality in zip(frames, operation["quality"], strict=True):
        _, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])
        compressed.append(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)))
    return compressed


def _codec(operation: Operation, frames: Frames, target: tuple[int, int], rng: np.random.Generator) -> Frames:
    return through_codec(frames, operation["codec"], operation["bits_per_frame"], operation["preset"])


_APPLY: dict[str, Callable[[Operation, Frames, tuple[int, int], np.random.Generator], Frames]] = {
    "sharpen": _sharpen,
    "blur": _blur,
    "resize": _resize,
    "resize_to_target": _resize_to_target,
    "noise": _noise,
    "jpeg": _jpeg,
    "codec": _codec,
}


def choose(rng: np.random.Generator, weights: dict[Any, float]) -> Any:
    ends = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]


def _listed(values: np.ndarray) -> list[float]:
    """As JSON numbers. They are rounded before they are applied, so the record is exactly what was done."""
    return [round(float(value), 5) for value in values]
