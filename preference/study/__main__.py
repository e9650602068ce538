"""A blind study: do people prefer our videos?

python -m preference.study make --method ours=DIR --method other=DIR --input LR --output STUDY
python -m preference.study serve STUDY
python -m preference.study result STUDY
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.atomic import write_atomic
from common.errors import UserError, run_command
from common.locking import only_writer
from preference.study.result import Count, count
from preference.study.store import ANSWERS, AnswerSheet, read_sheets, read_study
from preference.study.trials import QUESTIONS

#: fewer raters than that: percentile bootstrap intervals are too narrow [ours]
_FEW_RATERS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description="A blind study of videos of several methods.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="encode the pairs and write the key")
    make.add_argument("--method", action="append", default=[], metavar="NAME=FOLDER", help="the first is the reference")
    make.add_argument("--input", type=Path, required=True, help="folder of the low-resolution clips")
    make.add_argument("--output", type=Path, required=True)
    make.add_argument("--seed", type=int, default=0, help="of files, orders and sides")
    make.add_argument("--trials", type=int, help="per rater, drawn evenly; default: all")
    make.add_argument("--every-two", action="store_true", help="compare every two methods, not the first with each")
    make.add_argument("--frame-rate", type=Fraction, help="default: the first method's, 25 for folders of frames")
    serve = commands.add_parser("serve", help="show the page and keep the answers")
    serve.add_argument("study", type=Path)
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, without a password")
    serve.add_argument("--port", type=int, default=8010, help="0: any free one")
    result = commands.add_parser("result", help="count the answers")
    result.add_argument("study", type=Path)
    result.add_argument("--output", type=Path, help="write the table as JSON too")
    arguments = parser.parse_args()
    if arguments.command == "make":
        _make(arguments)
    elif arguments.command == "serve":
        from preference.study.server import serve as serve_study

        with only_writer(arguments.study / ANSWERS):
            serve_study(arguments.study, arguments.host, arguments.port)
    else:
        _result(arguments)


def _make(arguments: argparse.Namespace) -> None:
    from preference.study.make import make_study  # torch, which the other commands do without

    methods = {}
    for text in arguments.method:
        name, equals, folder = text.partition("=")
        if not equals or name in methods:
            raise UserError(f"--method {text!r}: write NAME=FOLDER, each name once")
        methods[name] = Path(folder)
    study = make_study(
        methods, arguments.input, arguments.output, seed=arguments.seed, trials_per_rater=arguments.trials,
        every_two=arguments.every_two, frame_rate=arguments.frame_rate,
    )  # fmt: skip
    print(f"{len(study.pairs)} pairs: python -m preference.study serve {arguments.output}")


def _result(arguments: argparse.Namespace) -> None:
    study = read_study(arguments.study)
    sheets = read_sheets(arguments.study, study)
    if not sheets:
        raise UserError(f"{arguments.study} holds no answers yet")
    rows = count(sheets)
    table = Table("methods", "question", "good", "same", "bad", "(G-B)/(G+S+B)", "95 % over raters", "equal", "alpha")
    for row in rows:
        interval = "-" if row.low is None else f"{row.low:+.3f} … {row.high:+.3f}"
        table.add_row(
            f"{row.reference} : {row.other}", row.question, str(row.good), str(row.same), str(row.bad),
            f"{row.score:+.3f}", interval, _number(row.equal), _number(row.alpha),
        )  # fmt: skip
    Console().print(table)
    for line in notes(sheets, rows):
        print(line)
    if arguments.output:
        raters = {sheet.rater: dict(Counter(row[3] for row in sheet.counted())) for sheet in sheets}
        document = {"study": study.identity, "raters": raters, "rows": [row.document() for row in rows]}
        write_atomic(arguments.output, json.dumps(document, indent=2) + "\n")


def notes(sheets: list[AnswerSheet], rows: list[Count]) -> list[str]:
    """What a reader of the table has to know."""
    lines = [f"{len(sheets)} rater(s); good: answers for the first method"]
    if len(sheets) < _FEW_RATERS:
        lines.append(f"intervals of fewer than {_FEW_RATERS} raters are too narrow")
    for sheet in sheets:
        asked, given = len(QUESTIONS) * len(sheet.trials), len(sheet.counted())
        if given < asked:
            lines.append(f"{sheet.rater} has answered {given} of {asked} questions; what is there is counted")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    run_command(main)
