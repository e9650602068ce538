"""The reference run: all four stages in under a minute on a CPU, and their curves to hold another run against.

    python benchmarks/reference_run.py                                     # train, then compare
    python benchmarks/reference_run.py --set trainer.engine.zero_stage=3   # the same, sharded
    deepspeed --num_gpus 2 benchmarks/reference_run.py --output RUN        # on two GPUs (or CPU ranks)
    python benchmarks/reference_run.py --compare RUN                       # an earlier run

configs/reference.yaml says what is trained, on clips made from a seed; every stage starts from the model that the one
before has left. The table gives each curve's largest deviation from benchmarks/results/reference_run/, the image
RUN/comparison.png both. The status is 1 where one is above --tolerance.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, from anywhere

# DeepSpeed looks for an accelerator on import; a machine without one is a CPU machine, not an error.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from common.config import load_section, resolved_yaml
from common.errors import UserError, run_command
from common.seeding import seeded_noise
from common.storage import open_folder
from datagen.dataset.shard_format import Sample, write_manifest, write_shard
from pipeline.model.config import ModelConfig
from pipeline.model.prompts import DEFAULT_PROMPT, placeholder_cache
from pipeline.model.tiny_vae import TinyVideoVAE

ROOT = Path(__file__).resolve().parent.parent
PRESET = ROOT / "configs" / "reference.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "reference_run"
STAGES = ("base", "progressive", "dual_stream", "preference")
CLIPS = 24
LATENT = (8, 3, 8, 8)  # C, T, h, w
#: what is compared; all other numbers of metrics.jsonl are clocks, counts or settings
COMPARED = ("loss", "gradient_norm", "d_hr", "d_s", "dmd_", "latent_", "margin", "winner_", "loser_", "student_steps")
#: largest deviation of a float32 run that computes the same thing; see README.md in RESULTS for what was measured
TOLERANCE = 0.002

#: name -> value at each step
Curves = dict[str, list[float]]


class Deviation(NamedTuple):
    """One curve's largest distance from the reference, as a share of the reference's mean absolute value."""

    stage: str
    name: str
    largest: float
    step: int
    mine: float
    theirs: float


# --- the run ------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """A VAE, prompts, clips and pairs: real files in the real formats, every number drawn from a seed."""
    torch.manual_seed(0)
    TinyVideoVAE(z_dim=LATENT[0], hidden_dim=8, num_blocks=1).save_pretrained(folder / "vae")
    placeholder_cache(text_dim=16, max_length=4).save_pretrained(folder / "prompts")
    for kind, make in (("clips", _clip), ("pairs", _pair)):
        sidecars = [
            write_shard(folder / kind, shard, [make(index) for index in range(shard, CLIPS, 2)]) for shard in range(2)
        ]
        write_manifest(open_folder(folder / kind), kind, sidecars, {"recipe": "reference run"})


def _clip(index: int) -> Sample:
    """z_HR is smooth in space with a little detail; z_LR lacks the detail."""
    coarse = seeded_noise((LATENT[0], LATENT[1], 4, 4), "reference", index, "coarse")
    z_lr = F.interpolate(coarse, size=LATENT[2:], mode="bilinear", align_corners=False)
    z_hr = z_lr + 0.3 * seeded_noise(LATENT, "reference", index, "detail")
    return _sample(f"clip-{index:03d}", "latents", {"z_hr": z_hr, "z_lr": z_lr}, {})


def _pair(index: int) -> Sample:
    """The winner is nearer to the clip than the loser."""
    clip = _clip(index).members["latents.safetensors"]
    z = {name: tensor.float() for name, tensor in load(clip).items()}
    tensors = {"z_lr": z["z_lr"]}
    for name, distance in (("win", 0.2), ("lose", 0.6)):
        tensors[f"z_{name}"] = z["z_hr"] + distance * seeded_noise(LATENT, "reference", index, name)
    noises = {f"noise_{name}": ["reference", index, name, "noise"] for name in ("win", "lose")}
    return _sample(f"pair-{index:03d}", "pair", tensors, noises)


def _sample(key: str, member: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Sample:
    content = save({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    document = json.dumps({"caption": DEFAULT_PROMPT, **metadata}).encode()
    return Sample(key, {f"{member}.safetensors": content, "json": document})


def train(output: Path, overrides: Sequence[str] = ()) -> None:
    """All stages into `output`/<stage>, and the resolved configuration beside them. Collective.

    Raises:
        UserError: `output` holds a run already, or an override is wrong.
    """
    from trainer.engine.process_group import start_distributed

    if (output / "configuration.yaml").exists():
        raise UserError(f"{output} holds a reference run: look at it with --compare, or give another --output")
    world = start_distributed()
    if world.rank == 0:
        make_data(output / "data")
        (output / "configuration.yaml").write_text(resolved_configuration(overrides))
    for stage in STAGES:
        torch.distributed.barrier()  # rank 0 has written what the others are about to read
        if not train_stage(stage, output, overrides):
            raise UserError(f"stage {stage} was stopped by a signal; remove {output} and begin again")


def train_stage(
    stage: str, output: Path, overrides: Sequence[str] = (), into: Path | None = None, stop_after: int | None = None
) -> bool:
    """One stage from the models in `output`, into `into` or its usual place; whether it came to its end."""
    from trainer import train as training
    from trainer.run import parse_arguments, training_job

    roles = {
        "progressive": ["--init", output / "base" / "model"],
        "dual_stream": [
            *("--init", output / "progressive" / "model"),
            *("--teacher", output / "progressive" / "teacher"),
        ],
        "preference": ["--init", output / "dual_stream" / "model"],
    }
    data = output / "data"
    line = ["--config", PRESET, "--stage", stage, "--output", into or output / stage]
    line += ["--data", data / ("pairs" if stage == "preference" else "clips"), *roles.get(stage, [])]
    for name in ("vae", "prompts"):
        line += ["--set", f"model.{name}={data / name}"]
    for override in overrides:
        line += ["--set", override]
    if stop_after is not None:
        line += ["--stop-after", stop_after]
    return training.train(training_job(parse_arguments([str(word) for word in line])))


def resolved_configuration(overrides: Sequence[str] = ()) -> str:
    """The preset with every default filled in, as YAML."""
    from trainer.config import TrainerConfig

    model = load_section(PRESET, "model", ModelConfig, list(overrides))
    return resolved_yaml(model=model, trainer=load_section(PRESET, "trainer", TrainerConfig, list(overrides)))


# --- the comparison -----------------------------------------------------------------------------------------


def read_run(folder: Path) -> dict[str, Curves]:
    """The compared curves of every stage that `folder` has.

    Raises:
        UserError: there is none.
    """
    found = {}
    for stage in STAGES:
        path = folder / stage / "metrics.jsonl"
        if path.exists():
            found[stage] = read_curves(path)
    if not found:
        raise UserError(f"{folder} holds no reference run: no <stage>/metrics.jsonl; make one without --compare")
    return found


def read_curves(path: Path) -> Curves:
    """The compared curves of one metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in lines[0] if name.startswith(COMPARED)]
    return {name: [line[name] for line in lines] for name in names}


def read_reference() -> dict[str, Curves]:
    """The committed curves."""
    reference: dict[str, Curves] = {}
    for stage in STAGES:
        with (RESULTS / f"{stage}.csv").open() as file:
            lines = list(csv.DictReader(file))
        names = [name for name in lines[0] if name != "step"]
        reference[stage] = {name: [float(line[name]) for line in lines] for name in names}
    return reference


def compare(mine: dict[str, Curves], theirs: dict[str, Curves], steps: int | None = None) -> list[Deviation]:
    """One line per curve of `theirs`; a curve of another length deviates infinitely where the shorter one ends.

    Args:
        steps: how many first ones the run should have; None: all.
    """
    found = []
    for stage, references in theirs.items():
        for name, whole in references.items():
            curve, reference = mine.get(stage, {}).get(name, []), whole[:steps]
            scale = sum(map(abs, whole)) / len(whole) or 1.0
            if len(curve) != len(reference):
                ends = min(len(curve), len(reference))
                values = (part[ends] if ends < len(part) else float("nan") for part in (curve, reference))
                found.append(Deviation(stage, name, float("inf"), ends, *values))
                continue
            sizes = [abs(a - b) / scale for a, b in zip(curve, reference, strict=True)]
            # what is not a number is the largest deviation of all
            sizes = [size if size == size else float("inf") for size in sizes]
            step = max(range(len(sizes)), key=sizes.__getitem__)
            found.append(Deviation(stage, name, sizes[step], step, curve[step], reference[step]))
    return found


def changed_settings(now: str, recorded: str) -> list[str]:
    """Settings of the recorded configuration that have another value now; folders don't count."""
    from trainer.loop import changes

    before, after = (yaml.safe_load(text) for text in (recorded, now))
    for document in (before, after):
        document["model"] |= {"vae": None, "prompts": None}
    return [line for line in changes(before, _as_far_as(before, after)) if line]


def _as_far_as(before: Any, after: Any) -> Any:
    """`after` without the settings that `before` doesn't know: one that is new changes nothing by being there."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    return {name: _as_far_as(before[name], value) for name, value in after.items() if name in before}


def table(deviations: list[Deviation], tolerance: float) -> str:
    """One line per curve."""
    lines = [f"{'stage':<12} {'curve':<28} {'deviation':>10} {'at step':>8} {'this run':>12} {'reference':>12}"]
    for d in deviations:
        verdict = "" if d.largest <= tolerance else f"  > {tolerance:g}"
        lines.append(
            f"{d.stage:<12} {d.name:<28} {d.largest:>10.1e} {d.step:>8} {d.mine:>12.6g} {d.theirs:>12.6g}{verdict}"
        )
    return "\n".join(lines)


def draw(mine: dict[str, Curves], theirs: dict[str, Curves], path: Path) -> None:
    """Losses and gradient norms of each stage; the reference is the broad grey line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(STAGES), figsize=(16, 6.5), layout="constrained")
    for column, stage in enumerate(STAGES):
        for row, prefix in enumerate(("loss", "gradient_norm")):
            axis = axes[row][column]
            names = [name for name in theirs.get(stage, {}) if name.startswith(prefix)]
            for name in names:
                axis.plot(theirs[stage][name], color="0.8", linewidth=5)
                label = name.removeprefix(f"{prefix}_")
                axis.plot(mine.get(stage, {}).get(name, []), linewidth=1.2, label=label)
            axis.set_title(f"{stage}: {prefix.replace('_', ' ')}", fontsize=10)
            axis.set_yscale("symlog", linthresh=0.1)
            axis.tick_params(labelsize=8)
            if len(names) > 1:
                axis.legend(fontsize=7)
    figure.suptitle("this run (thin) on the reference run (grey); steps from left to right", fontsize=11)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def record(run: Path) -> None:
    """Make `run` the reference."""
    curves = read_run(run)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for stage, columns in curves.items():
        with (RESULTS / f"{stage}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", *columns])
            for step, values in enumerate(zip(*columns.values(), strict=True)):
                writer.writerow([step, *(f"{value:.7g}" for value in values)])
    (RESULTS / "configuration.yaml").write_text(resolved_configuration())
    about = {
        "command": "python benchmarks/reference_run.py --record",
        "date": str(datetime.date.today()),
        "device": _device_name(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "deepspeed", "diffusers")},
    }
    (RESULTS / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    draw(curves, curves, RESULTS / "curves.png")


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"


def report(run: Path, tolerance: float) -> bool:
    """Print the table, save the image; whether the run is the reference run."""
    mine, theirs = read_run(run), read_reference()
    deviations = compare(mine, theirs)
    print(table(deviations, tolerance))
    for line in changed_settings(
        (run / "configuration.yaml").read_text(), (RESULTS / "configuration.yaml").read_text()
    ):
        print(f"this run is set otherwise than the reference: {line}")
    draw(mine, theirs, run / "comparison.png")
    print(f"image: {run / 'comparison.png'}")
    worst = max(deviations, key=lambda d: d.largest)
    agrees = worst.largest <= tolerance
    print(
        f"{'agrees' if agrees else 'DIFFERS'}: largest deviation {worst.largest:.1e} "
        f"({worst.stage}, {worst.name}), tolerance {tolerance:g}"
    )
    return agrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/reference"), help="folder of the new run")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="train nothing: look at an earlier run")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--record", action="store_true", help="make the run the new reference")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # from the launcher
    arguments = parser.parse_args()
    run = arguments.compare or arguments.output
    if arguments.compare is None:
        train(run, arguments.overrides)
        rank = torch.distributed.get_rank()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        if rank:
            return
    if arguments.record:
        record(run)
    if not report(run, arguments.tolerance):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
