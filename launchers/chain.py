"""All steps, from videos to Stage III's model: on this machine, or as jobs of a SLURM cluster.

    duo-vsr chain CONFIG VIDEOS OUTPUT [--test LOW HIGH]
    duo-vsr chain CONFIG VIDEOS OUTPUT [--test LOW HIGH] --slurm --nodes 4 --array 0-15 [-- SBATCH OPTIONS]
    duo-vsr chain CONFIG VIDEOS OUTPUT --plan --gpus 64

videos -> shards -> base -> Stage I -> Stage II -> pairs -> Stage III; with `--test` its model upscales the clips in LOW
and is scored against those in HIGH. Before the first step starts all is checked: configuration, folders, weights,
packages, batches, disk. The same command again goes on: finished work is not repeated.

On SLURM each job waits for the one before, and the first one (launchers/preflight.py, on all nodes) for the last one to
be submitted: where one is refused, none runs. What follows `--` is given to every sbatch.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launchers.steps import Step, StepFailed, StepRunner, one_line_endings, python

ROOT = Path(__file__).resolve().parents[1]
SUBMIT = ROOT / "launchers/slurm/submit.sh"
#: of a cluster's facts in launchers/slurm/cluster.sh, what the checks need
FACTS = 'source launchers/slurm/cluster.sh; printf "%s\\n" "$GPUS_PER_NODE" "$PYTHON" "$CONTAINER"'


@dataclass(frozen=True)
class ChainStep:
    """One step.

    Attributes:
        command: as `duo-vsr` and launchers/slurm name it (there with _ for -).
    """

    name: str
    command: str
    arguments: tuple[str, ...]


def chain(
    config: str, videos: str, output: Path, test: Sequence[str] | None = None, overrides: Sequence[str] = ()
) -> list[ChainStep]:
    """Every step, in order; each needs those before it.

    Args:
        test: folders of low-resolution clips and of what they should become.
        overrides: `--set` of every step that reads the configuration.
    """
    configured = ["--config", config, *(word for value in overrides for word in ("--set", value))]
    shards, pairs, model = output / "shards", output / "pairs", {"init": "--init", "teacher": "--teacher"}

    def train(stage: str, data: Path, **models: Path) -> ChainStep:
        folders = [word for name, folder in models.items() for word in (model[name], folder)]
        return step(stage, "train", *configured, "--stage", stage, "--data", data, "--output", output / stage, *folders)

    def step(name: str, command: str, *arguments: object) -> ChainStep:
        return ChainStep(name, command, tuple(map(str, arguments)))

    one_step = output / "dual_stream/model"
    steps = [
        step("shards", "build-shards", *configured, "--input", videos, "--output", shards),
        train("base", shards),
        train("progressive", shards, init=output / "base/model"),
        train("dual_stream", shards, init=output / "progressive/model", teacher=output / "progressive/teacher"),
        step("pairs", "build-preference", *configured, "--model", one_step, "--data", shards, "--output", pairs),
        train("preference", pairs, init=one_step),
    ]
    if test:
        upscaled, final = output / "upscaled", output / "preference/model"
        steps += [
            step("upscale", "upscale", test[0], upscaled, "--model", final, "--lossless"),
            step(
                "evaluate", "evaluate", "--video", upscaled, "--reference", test[1], "--output", output / "metrics.json"
            ),
        ]
    return steps


def local_commands(steps: Sequence[ChainStep], gpus: int = 0) -> list[tuple[str, ...]]:
    """The commands of the steps on this machine, training on `gpus` GPUs."""
    modules = {"build-shards": "datagen.build_shards", "build-preference": "preference.build"}
    modules |= {"upscale": "pipeline.upscale", "evaluate": "metrics.evaluate", "train": "trainer.run"}
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(gpus), "--module", "trainer.run")
    return [
        (*launcher, *step.arguments)
        if step.command == "train" and gpus > 1
        else python(modules[step.command], *step.arguments)
        for step in steps
    ]


def check(steps: Sequence[ChainStep], arguments: argparse.Namespace, interpreter: Sequence[str], gpus: int) -> None:
    """Everything that can be known before the first step.

    Args:
        interpreter: words that start Python where the steps will run.
        gpus: that training gets.

    Raises:
        StepFailed: all that is wrong.
    """
    folders = [arguments.videos, *(arguments.test or ())]
    faults = [f"no folder {folder}" for folder in folders if "://" not in folder and not Path(folder).exists()]
    if not Path(arguments.config).is_file():
        faults.append(f"no configuration {arguments.config}")
    given = {step.name: step.arguments for step in steps}
    configured = given["base"][: given["base"].index("--stage")]
    commands = {
        "datagen.build_shards": (*given["shards"], "--check"),
        "preference.build": (*given["pairs"], "--check"),
        "trainer.planning.plan": (*configured, "--gpus", str(gpus), "--check"),
    }
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(lambda item: _said([*interpreter, "-m", item[0], *item[1]]), commands.items()))
    faults += [text.removeprefix("error: ") for fine, text in said if not fine]
    if faults:
        raise StepFailed("nothing is started:\n  " + "\n  ".join(dict.fromkeys(faults)))
    needed = re.search(r"needs ([\d.]+) GiB", said[-1][1])
    existing = next(
        folder for folder in (arguments.output.absolute(), *arguments.output.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(existing).free / 2**30
    if needed and float(needed[1]) > free:
        raise StepFailed(
            f"nothing is started: checkpoints and models need {needed[1]} GiB of disk, shards come on top; "
            f"{existing} has {free:.1f} GiB"
        )


def _said(command: Sequence[str]) -> tuple[bool, str]:
    """Whether it succeeded, and its output; of one that failed the last line of its errors."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return True, done.stdout
    lines = done.stderr.strip().splitlines() or [f"{shlex.join(command)}: status {done.returncode}"]
    return False, lines[-1]


def run_here(steps: Sequence[ChainStep], arguments: argparse.Namespace) -> None:
    """Run what is not done yet; logs and stamps lie in OUTPUT/steps."""
    commands = local_commands(steps, arguments.gpus)
    listed = [Step(step.name, step.name, line) for step, line in zip(steps, commands, strict=True)]
    runner = StepRunner(arguments.output / "steps", listed)
    for step in listed:
        runner.run(step)


def submit(steps: Sequence[ChainStep], arguments: argparse.Namespace, options: Sequence[str]) -> None:
    """Submit all jobs or none, and print their ids.

    Raises:
        StepFailed: sbatch refused one; those before it are cancelled.
    """
    nodes, array = [f"--nodes={arguments.nodes}"], [f"--array={arguments.array}"]
    shape = {"preflight": nodes, "build-shards": nodes, "train": nodes, "build-preference": array, "upscale": array}
    jobs: list[str] = []
    lines = []
    for step in (ChainStep("preflight", "preflight", (str(arguments.output),)), *steps):
        waits = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else ["--hold"]
        words = [*shape.get(step.command, ()), f"--job-name=duo-vsr-{step.name}", *waits, *options]
        command = [str(SUBMIT), step.command.replace("-", "_"), *words, "--", *step.arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            if jobs:
                subprocess.run(["scancel", *jobs], check=False)
            raise StepFailed(f"{step.name} was refused, so no job runs: {done.stderr.strip()}")
        jobs.append(done.stdout.strip().partition(";")[0])  # a federation adds the cluster's name
        lines.append(f"{jobs[-1]} {step.name}")
    subprocess.run(["scontrol", "release", jobs[0]], check=True)
    print("\n".join(lines))


def cluster_facts() -> tuple[int, list[str]]:
    """GPUs of a node, and the words that start Python on it."""
    told = subprocess.run(["bash", "-c", FACTS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    gpus, interpreter, container = told.splitlines()
    return int(gpus.rpartition(":")[2]), [*shlex.split(container), interpreter]


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def parse_arguments(line: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Arguments, and the options for sbatch that follow `--`."""
    split = line.index("--") if "--" in line else len(line)
    parser = argparse.ArgumentParser(
        prog="duo-vsr chain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="preset, for instance configs/wan-1.3b.yaml")
    parser.add_argument("videos", help="what datagen.build_shards takes: a folder, a list, an s3:// prefix")
    parser.add_argument("output", type=Path, help="folder of everything that is made")
    parser.add_argument(
        "--test", nargs=2, metavar=("LOW", "HIGH"), help="folders of clips to upscale and to compare with"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument(
        "--gpus", type=int, help="of training on this machine, or of the plan; default: all that are here"
    )
    parser.add_argument("--plan", action="store_true", help="only print hours, memory and disk")
    parser.add_argument("--slurm", action="store_true", help="submit jobs; the cluster: launchers/slurm/cluster.sh")
    parser.add_argument("--nodes", type=int, default=1, help="of shards and training")
    parser.add_argument(
        "--array", default="0", metavar="FIRST-LAST", help="tasks of pairs and upscaling: 0-15, 1-16%%4, …"
    )
    arguments = parser.parse_args(line[:split])
    options = list(line[split + 1 :])
    if options and not arguments.slurm:
        parser.error("what follows -- is for sbatch: give --slurm")
    return arguments, options


def main() -> None:
    arguments, options = parse_arguments(sys.argv[1:])
    steps = chain(arguments.config, arguments.videos, arguments.output, arguments.test, arguments.overrides)
    if arguments.plan:
        configured = steps[1].arguments[: steps[1].arguments.index("--stage")]
        line = python("trainer.planning.plan", *configured, "--gpus", arguments.gpus or _gpus_here() or 1)
        os.execv(line[0], line)
    with one_line_endings():
        if arguments.slurm:
            per_node, interpreter = cluster_facts()
            check(steps, arguments, interpreter, max(1, per_node) * arguments.nodes)
            submit(steps, arguments, options)
        else:
            if arguments.gpus is None:
                arguments.gpus = _gpus_here()
            check(steps, arguments, [sys.executable], max(1, arguments.gpus))
            run_here(steps, arguments)


if __name__ == "__main__":
    main()
