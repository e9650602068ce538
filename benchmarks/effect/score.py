"""Score methods on held-out clips: is the method's effect there, and beyond chance?

    python benchmarks/effect/score.py --output FOLDER [--model NAME=FOLDER[:STEPS] ...] [--clips FOLDER]

Each clip of held_out.py is degraded by the recipe `light` with every seed, upscaled by every method, and scored:
bicubic, three controls (a sharpened bicubic; assets/small without its DiT; with its VAE to decode), Real-ESRGAN's two
networks, the models given, and the truth itself: what NIQE and the temporal error are where all is right. `scores.json`
holds `methods.<name>.<metric>`, the mean over clips and seeds; `intervals`, its 95 % interval; `differences` between
methods; `per_clip`. `effect.md` holds the table, `<clip>.png` the frames at 1:1. Scores are kept per method, clip and
seed, so a killed run resumes and a new method costs only itself.

Intervals are percentile bootstraps over clips, each clip being the mean of its seeds; differences are paired by clip.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, from anywhere

from benchmarks.effect.held_out import CLIPS, FRAMES, HeldOutClip
from benchmarks.effect.real_esrgan import NAMES, RealEsrgan
from common.atomic import atomic_file, write_atomic
from common.errors import UserError, run_command
from common.fingerprint import files_fingerprint
from common.progress import progress
from datagen.degradation.degrade import degrade_clip
from datagen.format_revision import DEGRADATION_REVISION
from metrics.bootstrap import Estimate, estimate, interval
from metrics.clips import to_tensor
from metrics.comparison.tables import pipe_table, text
from metrics.labelled_grid import labelled_grid
from metrics.registry import create_all, find_metric
from pipeline.latent_codec import CodecName
from pipeline.model.vae import to_frames, upsample_low_resolution
from pipeline.vsr_pipeline import open_pipeline

SEEDS = (0, 1, 2)
RECIPE = "light"
METRICS = ("niqe", "vmaf", "vmaf_neg", "cvvdp", "psnr", "temporal", "grid", "noise")
SMALL = Path(__file__).resolve().parents[2] / "assets" / "small"
SHIPPED = [f"shipped={SMALL}"]
#: the frame that the images show
SHOWN = FRAMES // 2

Upscaler = Callable[[np.ndarray], np.ndarray]
#: [method][clip][seed][metric]
Scores = dict[str, dict[str, dict[str, dict[str, float]]]]


def bicubic(low: np.ndarray) -> np.ndarray:
    """uint8 (F, h, w, 3) to uint8 (F, 4h, 4w, 3)."""
    return to_frames(upsample_low_resolution(low), 8).numpy()


def bicubic_sharpened(low: np.ndarray) -> np.ndarray:
    """A control that restores nothing: bicubic, then an unsharp mask of weight 1 and sigma 2 px.

    What a metric gives to contrast alone. VMAF-NEG gives it most of what it gives to Real-ESRGAN.
    """
    large = bicubic(low).astype(np.float32)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 2.0) for frame in large])
    return np.clip(2 * large - blurred, 0, 255).round().astype(np.uint8)


def model_upscaler(folder: Path, steps: int | None, codec: CodecName | None = None) -> Upscaler:
    """One call of the pipeline for the clip, seed 0."""
    pipeline = open_pipeline(folder)
    return lambda low: pipeline(low, num_inference_steps=steps, codec=codec).frames


def prediction(folder: Path) -> Upscaler:
    """A control: the model without its DiT, the convolutional prediction of z_HR alone.

    Raises:
        UserError: the model has no such prediction.
    """
    pipeline = open_pipeline(folder)
    if not pipeline.transformer.config.low_resolution_predictor:
        raise UserError(f"{folder} has no low_resolution_predictor: there is nothing without its DiT")
    torch.nn.init.zeros_(pipeline.transformer.proj_out.weight)
    torch.nn.init.zeros_(pipeline.transformer.proj_out.bias)
    return lambda low: pipeline(low, num_inference_steps=1).frames


def parse_models(values: Iterable[str]) -> dict[str, tuple[Path, int | None]]:
    """`NAME=FOLDER[:STEPS]` of each.

    Raises:
        UserError: another form, or no such folder.
    """
    models = {}
    for value in values:
        name, equals, place = value.partition("=")
        folder, _, steps = place.partition(":")
        if not (name and equals and Path(folder).is_dir() and (steps.isdigit() or not steps)):
            raise UserError(f"--model {value}: give NAME=FOLDER or NAME=FOLDER:STEPS, and a model folder that exists")
        models[name] = (Path(folder), int(steps) if steps else None)
    return models


def run_method(
    name: str,
    upscaler: Callable[[], Upscaler] | None,
    version: str,
    output: Path,
    clips: Path | None,
    seeds: tuple[int, ...] = SEEDS,
) -> Any:
    """Scores of one method by clip and seed; what is in `output/cache` is not computed again.

    Args:
        upscaler: None: the truth.
        seeds: of the degradation.
    """
    file = output / "cache" / f"{name}.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    version += f", degradation {DEGRADATION_REVISION}"
    if known.get("version") != version:
        known = {"version": version, "scores": {}}
    metrics, upscale = None, None
    with progress(len(CLIPS) * len(seeds), name, "clips") as counter:
        for clip in CLIPS:
            for seed in seeds:
                found = known["scores"].setdefault(clip.name, {}).get(str(seed), {})
                image = output / "frames" / f"{clip.name}-{name}.png"
                if set(METRICS) - set(found) or (seed == seeds[0] and not image.is_file()):
                    upscale, metrics = upscale or (upscaler and upscaler()), metrics or create_all(METRICS)
                    high = clip.frames(clips)
                    frames = upscale(degrade_clip(high, RECIPE, seed)[0]) if upscale else high
                    if seed == seeds[0]:
                        save_image(Image.fromarray(frames[SHOWN]), image)
                    video, reference = to_tensor(frames), to_tensor(high)
                    known["scores"][clip.name][str(seed)] = {
                        metric.name: metric(video, reference if metric.needs_reference else None) for metric in metrics
                    }
                    write_atomic(file, json.dumps(known, indent=1))
                counter.advance()
    return known["scores"]


def per_clip(scores: Scores, method: str, metric: str) -> np.ndarray:
    """One number per clip, the mean of its seeds."""
    return np.array([np.mean([seed[metric] for seed in clip.values()]) for clip in scores[method].values()])


def summary(scores: Scores) -> dict[str, Any]:
    """Means, intervals, and for each pair of methods the paired difference with its interval."""
    names = list(scores)
    values = {name: {metric: per_clip(scores, name, metric) for metric in METRICS} for name in names}
    differences = {
        f"{a} - {b}": {metric: list(estimate(values[a][metric] - values[b][metric])) for metric in METRICS}
        for a in names
        for b in names
        if a != b
    }
    return {
        "recipe": RECIPE,
        "seeds": list(SEEDS),
        "methods": {name: {metric: float(v.mean()) for metric, v in values[name].items()} for name in names},
        "intervals": {name: {metric: interval(v) for metric, v in values[name].items()} for name in names},
        "differences": differences,
        "per_clip": scores,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: mean and 95 % interval by method and metric."""
    arrows = [f"{metric} {'↓' if find_metric(metric).lower_is_better else '↑'}" for metric in METRICS]
    body = [
        [name, *(text(Estimate(means[metric], *result["intervals"][name][metric]), 2) for metric in METRICS)]
        for name, means in result["methods"].items()
    ]
    return pipe_table(["", *arrows], body)


def save_image(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        image.save(temporary, "PNG")


def contact_sheet(clip: HeldOutClip, methods: Iterable[str], output: Path) -> None:
    """The same frame of every method at 1:1, three in a row."""
    images = {name: Image.open(output / "frames" / f"{clip.name}-{name}.png") for name in methods}
    save_image(labelled_grid(list(images.items()), columns=3), output / f"{clip.name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables, images and kept scores")
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME=FOLDER[:STEPS]",
        help="default: the repository's, shipped=assets/small",
    )
    parser.add_argument("--clips", type=Path, help="folder of the clips' files, instead of the installed wheels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    own = files_fingerprint(sorted(SMALL.glob("*/*.safetensors")), SMALL)
    methods: dict[str, tuple[Callable[[], Upscaler] | None, str]] = {
        "bicubic": (lambda: bicubic, "1"),
        "bicubic-sharpened": (lambda: bicubic_sharpened, "1"),
        "prediction": (lambda: prediction(SMALL), own),
        "shipped-full-codec": (lambda: model_upscaler(SMALL, None, "full"), own),
    }
    for name in NAMES:
        methods[name] = (lambda name=name: RealEsrgan(name), "1")  # type: ignore[misc]
    for name, (folder, steps) in parse_models(arguments.model or SHIPPED).items():
        version = f"{files_fingerprint(sorted(folder.rglob('*.safetensors')), folder)} {steps}"
        methods[name] = (lambda folder=folder, steps=steps: model_upscaler(folder, steps), version)  # type: ignore[misc]
    methods["truth"] = (None, "1")
    scores: Scores = {
        name: run_method(name, upscaler, version, arguments.output, arguments.clips)
        for name, (upscaler, version) in methods.items()
    }
    result = summary(scores)
    write_atomic(arguments.output / "scores.json", json.dumps(result, indent=1))
    write_atomic(arguments.output / "effect.md", table(result))
    for clip in CLIPS:
        contact_sheet(clip, methods, arguments.output)
    print(table(result))


if __name__ == "__main__":
    run_command(main)
