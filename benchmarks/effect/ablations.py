"""Judge the paper's orders: what benchmarks/effect/train.py trained with several seeds, scored on held-out clips.

    python benchmarks/effect/ablations.py --rows FOLDER --output FOLDER [--base MODEL_FOLDER]

FOLDER of `--rows` holds seed-N/ROW/model. Each of them upscales the clips of held_out.py, degraded with one seed, and
is scored as in score.py; scores are kept, so a killed run resumes.

An order compares two rows of the same training seed on the same clip, in NIQE, which the paper has too, and in VMAF-NEG
and PSNR. It *holds* or *is refuted* where the 95 % interval over clips (each the mean of its training seeds) excludes
zero and the means of all training seeds have its sign; else it is *undecided*. `ablations.md` and `ablations.json`
hold both tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, from anywhere

from benchmarks.effect.held_out import CLIPS
from benchmarks.effect.score import METRICS, model_upscaler, run_method
from benchmarks.effect.train import ROWS
from common.atomic import write_atomic
from common.errors import UserError, run_command
from common.fingerprint import files_fingerprint
from metrics.bootstrap import estimate
from metrics.comparison.tables import pipe_table, text
from metrics.registry import find_metric

JUDGES = ("niqe", "vmaf_neg", "psnr")
#: of the degradation
SEED = 0


class Order(NamedTuple):
    """`better` is said to be better than `worse`."""

    claim: str
    better: str
    worse: str
    source: str


ORDERS = (
    Order("I+II better than I", "dual_stream", "progressive", "paper"),
    Order("I+III better than I", "without_dual_stream", "progressive", "paper"),
    Order("I+II+III better than I+II", "preference", "dual_stream", "paper"),
    Order("I+II+III better than I+III", "preference", "without_dual_stream", "paper"),
    Order("50 steps of the base better than I+II+III", "base", "preference", "paper"),
    Order("both streams better than DMD alone", "dual_stream", "dmd_only", "paper"),
    Order("both streams better than RFS-GAN alone", "dual_stream", "gan_only", "paper"),
    Order("both at once better than DMD, then GAN", "dual_stream", "dmd_then_gan", "paper"),
    Order("features of both scores better than the real one's", "dual_stream", "real_features", "paper"),
    Order("features of both scores better than the fake one's", "dual_stream", "fake_features", "paper"),
    Order("noised discriminator inputs better than clean ones", "dual_stream", "clean_discriminator", "paper"),
    Order("preferences better than swapped ones", "preference", "swapped_labels", "control"),
    Order("decoupled DMD better than DMD", "decoupled_dmd", "dual_stream", "2511.22677"),
    Order("data forcing better than none", "data_forcing", "dual_stream", "2606.18478"),
)

#: metric values by (row, training seed, clip)
Values = dict[str, dict[int, dict[str, dict[str, float]]]]


def trained(rows: Path) -> dict[str, dict[int, Path]]:
    """Model folders by row and training seed, rows in the order of train.py.

    Raises:
        UserError: there are none.
    """
    found: dict[str, dict[int, Path]] = {}
    for name in ROWS:
        for folder in sorted(rows.glob(f"seed-*/{name}/model")):
            found.setdefault(name, {})[int(folder.parts[-3].removeprefix("seed-"))] = folder
    if not found:
        raise UserError(f"--rows {rows}: no seed-N/ROW/model in it; benchmarks/effect/train.py makes them")
    return found


def judged(values: Values, order: Order, metric: str) -> tuple[str, str] | None:
    """The verdict and the paired difference as text; None where a row is missing."""
    if order.better not in values or order.worse not in values:
        return None
    better, worse = values[order.better], values[order.worse]
    once = 1 in (len(better), len(worse))
    seeds = sorted(max(better, worse, key=len) if once else set(better) & set(worse))
    a, b = (np.array([_of_clips(row, seed, metric) for seed in seeds]) for row in (better, worse))
    gain = (b - a) if find_metric(metric).lower_is_better else a - b
    found, signs = estimate(gain.mean(0)), set(np.sign(gain.mean(1)))
    verdict = "undecided"
    if found.excludes_zero and len(signs) == 1:
        verdict = "holds" if found.mean > 0 else "is refuted"
    return verdict, text(estimate((a - b).mean(0)), 2)


def _of_clips(row: dict[int, dict[str, dict[str, float]]], seed: int, metric: str) -> list[float]:
    """Of a row that was trained with that seed, or of the one training that it has."""
    clips = row[seed] if seed in row else next(iter(row.values()))
    return [clips[clip.name][metric] for clip in CLIPS]


def page(values: Values) -> str:
    """Both tables, Markdown."""
    arrows = [f"{metric} {'↓' if find_metric(metric).lower_is_better else '↑'}" for metric in METRICS]
    body = [
        [name, str(len(row)), *(f"{np.mean([_of_clips(row, s, m) for s in row]):.2f}" for m in METRICS)]
        for name, row in values.items()
    ]
    orders = []
    for order in ORDERS:
        cells = [judged(values, order, metric) for metric in JUDGES]
        if None not in cells:
            orders.append([order.claim, order.source, *(f"{cell[0]}: {cell[1]}" for cell in cells if cell)])
    tables = pipe_table(["row", "training seeds", *arrows], body), pipe_table(["order", "of", *JUDGES], orders)
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="--output of benchmarks/effect/train.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables and kept scores")
    parser.add_argument("--base", type=Path, help="the base that the rows start from, scored with its own steps")
    parser.add_argument("--clips", type=Path, help="folder of the clips' files, instead of the installed wheels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models: dict[str, dict[int, Path]] = {"base": {0: arguments.base}} if arguments.base else {}
    models |= trained(arguments.rows)
    values: Values = {}
    for name, folders in models.items():
        for seed, folder in folders.items():
            version = files_fingerprint(sorted(folder.rglob("*.safetensors")), folder)
            scores: Any = run_method(
                f"{name}-{seed}",
                lambda folder=folder: model_upscaler(folder, None),  # type: ignore[misc]
                version,
                arguments.output,
                arguments.clips,
                (SEED,),
            )
            values.setdefault(name, {})[seed] = {clip: found[str(SEED)] for clip, found in scores.items()}
    write_atomic(arguments.output / "ablations.json", json.dumps(values, indent=1))
    write_atomic(arguments.output / "ablations.md", page(values) + "\n")
    print(page(values))


if __name__ == "__main__":
    run_command(main)
