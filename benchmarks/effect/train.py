"""Train what benchmarks/effect/score.py compares: the chain and the paper's ablations, for several seeds.

    python benchmarks/effect/train.py --data SHARDS --validation-data SHARDS --output FOLDER \
        [--rows dual_stream,preference,…] [--seeds 0,1,2] [--base MODEL_FOLDER]

Every row is a command of the trainer, run after the rows it starts from. A row that is done is not run again; a killed
one resumes from its checkpoint. Rows lie in OUTPUT/seed-N/ROW/model; the base is trained once, with seed 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, from anywhere

from common.errors import UserError, run_command
from launchers.steps import Step, StepFailed, StepRunner, python

CONFIG = "configs/small.yaml"
#: of one CPU core, for the estimate of what is left [ours]
SECONDS = {"base": 1900, "progressive": 160, "dual_stream": 130, "pairs": 170, "preference": 110}


@dataclass(frozen=True)
class Row:
    """One line of the ablation tables."""

    stage: str
    #: the row whose model it starts from
    init: str
    #: the row that its frozen real score comes from
    teacher: str | None = None
    #: what differs from the preset
    settings: tuple[str, ...] = ()


def _dual_stream(*settings: str) -> Row:
    return Row("dual_stream", "progressive", "progressive", tuple(f"trainer.dual_stream.{value}" for value in settings))


#: name -> row, each after those it needs
ROWS: dict[str, Row] = {
    "progressive": Row("progressive", "base"),
    "dual_stream": _dual_stream(),
    "preference": Row("preference", "dual_stream"),
    "without_dual_stream": Row("preference", "progressive"),
    "dmd_only": _dual_stream("gan_weight=0", "feature_matching_weight=0"),
    "gan_only": _dual_stream("dmd_weight=0"),
    "dmd_then_gan": _dual_stream("schedule=sequential", "sequential_dmd_steps=25"),
    "real_features": _dual_stream("tapped=real"),
    "fake_features": _dual_stream("tapped=fake"),
    "clean_discriminator": _dual_stream("discriminator_input=clean"),
    "swapped_labels": Row("preference", "dual_stream", settings=("trainer.preference.swap_labels=true",)),
    "decoupled_dmd": Row(
        "dual_stream",
        "progressive",
        "base",
        ("trainer.dual_stream.real_score_guidance=1.0", "trainer.dual_stream.guidance_time_range=[0.5,0.98]"),
    ),
    "data_forcing": _dual_stream("data_forcing_weight=1.0", "data_forcing_from_step=25"),
}


def chain(names: list[str]) -> list[str]:
    """`names` and the rows that they start from, in the order of ROWS.

    Raises:
        UserError: an unknown row.
    """
    wanted: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in ROWS:
            raise UserError(f"--rows {name}: choose from {', '.join(ROWS)}")
        wanted.add(name)
        row = ROWS[name]
        waiting += [other for other in (row.init, row.teacher) if other in ROWS and other not in wanted]
    return [name for name in ROWS if name in wanted]


def steps(name: str, seed: int, base: Path, arguments: argparse.Namespace) -> list[Step]:
    """The commands of one row."""
    row, folder = ROWS[name], arguments.output / f"seed-{seed}"
    model = base if row.init == "base" else folder / row.init / "model"
    data, before = arguments.data, []
    if row.stage == "preference":
        data = folder / f"pairs-{row.init}"
        build = python(
            "preference.build", "--config", arguments.config, "--model", model, "--data", arguments.data,
            "--output", data, "--metrics", arguments.metrics,
        )  # fmt: skip
        before.append(
            Step(f"pairs-{row.init}-{seed}", f"preference pairs of {row.init}, seed {seed}", build, SECONDS["pairs"])
        )
    teacher = []
    if row.teacher is not None:
        teacher = ["--teacher", base if row.teacher == "base" else folder / row.teacher / "teacher"]
    values = (*row.settings, f"trainer.seed={seed}", "trainer.compile_blocks=true")
    settings = [word for value in values for word in ("--set", value)]
    command = (
        sys.executable, "trainer/run.py", "--config", arguments.config, "--stage", row.stage, "--data", data,
        "--init", model, *teacher, "--output", folder / name, *settings, *_validation(row, arguments),
    )  # fmt: skip
    return [*before, Step(f"{name}-{seed}", f"{name}, seed {seed}", tuple(map(str, command)), SECONDS[row.stage])]


def _validation(row: Row, arguments: argparse.Namespace) -> list[object]:
    """Pairs are not held-out clips, so Stage III's training takes none."""
    if arguments.validation_data is None or row.stage == "preference":
        return []
    return ["--validation-data", arguments.validation_data]


def plan(arguments: argparse.Namespace) -> list[Step]:
    """Every command once, each after those it needs."""
    base = arguments.base or arguments.output / "base" / "model"
    planned: list[Step] = []
    if arguments.base is None:
        command = [sys.executable, "trainer/run.py", "--config", arguments.config, "--stage", "base"]
        command += ["--data", arguments.data, "--output", arguments.output / "base"]
        command += _validation(Row("base", "base"), arguments)
        planned.append(Step("base", "base, seed 0", tuple(map(str, command)), SECONDS["base"]))
    for seed in map(int, arguments.seeds.split(",")):
        for name in chain(arguments.rows.split(",")):
            planned += steps(name, seed, base, arguments)
    return list({step.name: step for step in planned}.values())


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `words` in place of the process's own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--data", type=Path, required=True, help="shards of that preset")
    parser.add_argument("--validation-data", type=Path, help="shards of held-out clips")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--base", type=Path, help="a trained base model's folder; default: train one with seed 0")
    parser.add_argument("--metrics", default="weight-free", help="judges of the preference pairs")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse_arguments()
    planned = plan(arguments)
    runner = StepRunner(arguments.output / "steps", planned)
    try:
        for step in planned:
            runner.run(step)
    except StepFailed as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run_command(main)
