"""A blind study: do people prefer our videos? One HTML page asks, `score` counts good, same and bad (GSB).

    python -m preference.study make --ours DIR --other DIR --output STUDY [--seed 0]
    python -m preference.study score --key STUDY/key.json answers.json ...

`make` pairs the videos of the two folders by name, shuffles their order and decides each pair's sides from
the seed. STUDY/page/ goes to the raters (open index.html; it works from disk and sends nothing anywhere) and
hands each of them an answers.json at the end. STUDY/key.json stays behind: it alone says which side was ours.
The score is (G - B)/(G + B + S) in [-1, 1]: 1 if ours was always better.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from common.atomic import write_atomic
from common.errors import UserError
from common.seeding import derive_seed

#: what browsers play
_SUFFIXES = (".mp4", ".webm")
_CHOICES = ("left", "same", "right")


@dataclass(frozen=True)
class Tally:
    """Answers counted from our side."""

    good: int
    same: int
    bad: int

    @property
    def score(self) -> float:
        """(G - B)/(G + B + S); 0 without answers."""
        total = self.good + self.same + self.bad
        return (self.good - self.bad) / total if total else 0.0

    @property
    def p_value(self) -> float:
        """Two-sided sign test: the chance of a split at least as uneven if no one had a preference."""
        decided = self.good + self.bad
        return float(binomtest(self.good, decided).pvalue) if decided else 1.0


def make_study(ours: Path, other: Path, output: Path, seed: int = 0) -> dict[str, Any]:
    """Write the page, its clips and the key.

    Returns:
        The key: `study` (an identity that answers repeat) and `pairs`, each with `name` and the side of
        `ours`.

    Raises:
        UserError: no pair, a video without its partner, or a study already there.
    """
    names = _paired_names(ours, other)
    if (output / "key.json").exists():
        raise UserError(f"{output} holds a study already; choose another --output")
    random.Random(derive_seed("study order", seed)).shuffle(names)
    study = f"{derive_seed('study', seed, *names):016x}"
    clips = output / "page" / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    pairs, shown = [], []
    for index, name in enumerate(names):
        side = "left" if derive_seed("study side", seed, name) % 2 else "right"
        left, right = (ours, other) if side == "left" else (other, ours)
        files = {}
        for place, folder in (("left", left), ("right", right)):
            target = clips / f"{index:03d}-{place}{Path(name).suffix}"
            shutil.copyfile(folder / name, target)
            files[place] = f"clips/{target.name}"
        pairs.append({"name": name, "ours": side})
        shown.append(files)
    key = {"study": study, "seed": seed, "pairs": pairs}
    write_atomic(output / "page" / "index.html", _page(study, shown))
    write_atomic(output / "key.json", json.dumps(key, indent=2) + "\n")
    return key


def tally(key: dict[str, Any], answers: Sequence[dict[str, Any]]) -> Tally:
    """Count the answers of one or more raters.

    Raises:
        UserError: answers to another study, or none of the three choices.
    """
    counts = {"good": 0, "same": 0, "bad": 0}
    for sheet in answers:
        if sheet.get("study") != key["study"]:
            raise UserError(f"answers of {sheet.get('rater', 'a rater')} belong to another study than this key")
        for index, choice in sheet["answers"].items():
            if choice not in _CHOICES or not 0 <= int(index) < len(key["pairs"]):
                raise UserError(f"answer {choice!r} to pair {index} is none of {', '.join(_CHOICES)}")
            if choice == "same":
                counts["same"] += 1
            else:
                counts["good" if choice == key["pairs"][int(index)]["ours"] else "bad"] += 1
    return Tally(**counts)


def _paired_names(ours: Path, other: Path) -> list[str]:
    found = []
    for folder in (ours, other):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
        found.append({path.name for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES})
    alone = sorted(found[0] ^ found[1])
    if alone:
        raise UserError(f"{alone[0]} is in one of {ours} and {other} only; pairs have the same name")
    if not found[0]:
        raise UserError(f"{ours} holds no {' or '.join(_SUFFIXES)}, which is what browsers play")
    return sorted(found[0])


def _page(study: str, pairs: list[dict[str, str]]) -> str:
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True)
    return environment.get_template("study.html").render(study=study, pairs=pairs)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except json.JSONDecodeError:
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(document, dict) or "study" not in document:
        raise UserError(f"{path} is neither a key nor the answers of a study")
    return document


def _print(key: dict[str, Any], sheets: list[dict[str, Any]]) -> None:
    table = Table("rater", "good", "same", "bad", "(G-B)/(G+B+S)", "p (sign test)")
    rows = [(str(sheet.get("rater", "?")), tally(key, [sheet])) for sheet in sheets]
    for name, row in [*rows, ("all", tally(key, sheets))]:
        table.add_row(name, str(row.good), str(row.same), str(row.bad), f"{row.score:+.3f}", f"{row.p_value:.3f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="A blind study of two sets of videos.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write the page and the key")
    make.add_argument("--ours", type=Path, required=True)
    make.add_argument("--other", type=Path, required=True)
    make.add_argument("--output", type=Path, required=True)
    make.add_argument("--seed", type=int, default=0)
    score = commands.add_parser("score", help="count the answers")
    score.add_argument("--key", type=Path, required=True)
    score.add_argument("answers", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "make":
        key = make_study(arguments.ours, arguments.other, arguments.output, arguments.seed)
        print(f"{len(key['pairs'])} pairs; give {arguments.output / 'page'} to the raters, keep key.json")
    else:
        _print(_read(arguments.key), [_read(path) for path in arguments.answers])
