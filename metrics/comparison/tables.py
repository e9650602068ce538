"""A comparison as Markdown, LaTeX and CSV. Rows are metrics on sets, as in the paper's tables; columns are methods."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metrics.bootstrap import RESAMPLES, Estimate
from metrics.comparison.clip_sets import ComparedMethod, ComparedSet
from metrics.comparison.summary import Mark, Row

NOTHING = "–"
#: below it a percentile bootstrap covers clearly less than 95 %: three equal signs of a coin would be told [ours]
FEW_CLIPS = 10
#: facts of methods, with their headings
FACTS = {"seconds": "seconds", "parameters_b": "parameters, 10⁹"}
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--",
    "…": r"\dots{}", "⁹": "$^9$", "×": r"$\times$",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What the tables show."""

    methods: list[ComparedMethod]
    sets: list[ComparedSet]
    rows: list[Row]
    reference_method: str

    @property
    def names(self) -> list[str]:
        return [method.name for method in self.methods]

    def legend(self) -> list[str]:
        """What must be known to read the tables, remarks on sets included."""
        return [
            f"Means over clips, in brackets 95 % intervals (percentile bootstrap over clips, "
            f"{RESAMPLES} draws). Behind a set: its clips.",
            "Bold: best, and the interval of its paired difference to the second best excludes 0. Underlined: second "
            "best; the best too where that interval includes 0 or there is one clip.",
            *(
                f"{clip_set.name}: intervals over {len(clip_set.clips)} clips are too narrow; bold says little."
                for clip_set in self.sets
                if len(clip_set.clips) < FEW_CLIPS
            ),
            *(remark for clip_set in self.sets for remark in clip_set.remarks),
        ]


def heading(row: Row) -> str:
    """The metric's label and the direction of improvement."""
    return f"{row.metric.label} {'↓' if row.metric.lower_is_better else '↑'}"


def text(value: Estimate, digits: int, *, sign: bool = False) -> str:
    """`28.10 (27.52…28.71)`."""
    plus = "+" if sign else ""
    if value.low is None:
        return f"{value.mean:{plus}.{digits}f}"
    return f"{value.mean:{plus}.{digits}f} ({value.low:{plus}.{digits}f}…{value.high:{plus}.{digits}f})"


def digits(row: Row) -> int:
    """Two decimals, or four where all values are small."""
    return 2 if max(abs(row.mean(method).mean) for method in row.values) >= 2 else 4


def markdown(comparison: Comparison) -> str:
    """The table, the paired differences, the legend."""

    def marked(words: str, mark: Mark) -> str:
        return {"best": f"**{words}**", "": words}.get(mark, f"<u>{words}</u>")

    def escaped(words: str) -> str:
        return words.replace("|", "\\|").replace("*", "\\*")

    body = _body(comparison, lambda row, name: marked(text(row.mean(name), digits(row)), row.marks()[name]), escaped)
    body += [["", label, *values] for label, values in _facts(comparison)]
    head = ["set", "metric", *map(escaped, comparison.names)]
    parts = [pipe_table(head, body)]
    others = [name for name in comparison.names if name != comparison.reference_method]
    if others:
        base = comparison.reference_method
        body = _body(
            comparison, lambda row, name: text(row.difference(name, base), digits(row), sign=True), escaped, others
        )
        parts += [f"Paired differences to {base}:\n", pipe_table(["set", "metric", *map(escaped, others)], body)]
    return "\n".join(parts) + "\n" + "".join(f"- {line}\n" for line in comparison.legend())


def pipe_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = ["".join(f" {cell} |" if cell else " |" for cell in line) for line in (head, *body)]
    lines.insert(1, "---|" * len(head))
    return "".join(f"|{line}\n" for line in lines)


def latex(comparison: Comparison) -> str:
    """A tabular for the package booktabs, without intervals; the legend as comments."""

    def marked(row: Row, name: str) -> str:
        mark, words = row.marks()[name], f"{row.mean(name).mean:.{digits(row)}f}"
        return {"best": rf"\textbf{{{words}}}", "": words}.get(mark, rf"\underline{{{words}}}")

    head = ["Set", "Metric", *map(latex_escaped, comparison.names)]
    body = _body(comparison, marked, latex_escaped)
    facts = [[latex_escaped(cell) for cell in ("", label, *values)] for label, values in _facts(comparison)]
    lines = [f"% {line}" for line in comparison.legend()]
    lines += [rf"\begin{{tabular}}{{ll{'c' * len(comparison.methods)}}}", r"\toprule"]
    for index, cells in enumerate([head, *body, *facts]):
        if (cells[0] and index) or cells in facts[:1]:
            lines.append(r"\midrule")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def latex_escaped(words: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in words)


def comma_separated(comparison: Comparison) -> str:
    """One line per set, metric and method."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = ["set", "metric", "method", "clips", "mean", "low", "high", "mark"]
    writer.writerow([*columns, "reference_method", "difference", "difference_low", "difference_high", *FACTS])
    facts = {method.name: [getattr(method.facts, fact) for fact in FACTS] for method in comparison.methods}
    for row in comparison.rows:
        marks = row.marks()
        for name in row.values:
            difference = row.difference(name, comparison.reference_method)
            line = [row.set_name, row.metric.name, name, row.clips, *row.mean(name), marks[name]]
            writer.writerow([*line, comparison.reference_method, *difference, *facts[name]])
    return stream.getvalue()


def _body(
    comparison: Comparison,
    cell: Callable[[Row, str], str],
    escaped: Callable[[str], str],
    names: list[str] | None = None,
) -> list[list[str]]:
    lines, last = [], None
    for row in comparison.rows:
        name = "" if row.set_name == last else escaped(f"{row.set_name} ({row.clips})")
        last = row.set_name
        lines.append([name, escaped(heading(row)), *(cell(row, method) for method in names or comparison.names)])
    return lines


def _facts(comparison: Comparison) -> list[tuple[str, list[str]]]:
    values = {fact: [getattr(method.facts, fact) for method in comparison.methods] for fact in FACTS}
    return [
        (FACTS[fact], [NOTHING if value is None else f"{value:g}" for value in found])
        for fact, found in values.items()
        if any(value is not None for value in found)
    ]
