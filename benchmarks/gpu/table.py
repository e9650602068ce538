"""The results of one part as JSON and Markdown, rewritten atomically after every row: a killed run keeps its rows."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from common.atomic import write_atomic
from common.errors import UserError

Outcome = Literal["passed", "measured", "FAILED", "out of memory", "not here", "no time left"]
#: of a one-line reason
LONGEST_REASON = 200


class NotHere(Exception):
    """Something that this machine lacks; the message says what."""


class Table:
    """Rows of one part: name, outcome, what was measured, and the reason where there is nothing."""

    def __init__(self, folder: Path, part: str, about: dict[str, Any], minutes: float) -> None:
        """
        Args:
            about: command, date, device and versions, written with the rows.
            minutes: after which no further row is begun.
        """
        self.rows: list[dict[str, Any]] = []
        self._stem, self._part, self._about = folder / f"gpu_{part}_{about['device']}", part, about
        self._began, self._minutes = time.monotonic(), minutes

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]]) -> Outcome:
        """Add the row of `measure`, whatever happens in it.

        Args:
            measure: returns the row's values. With a `deviation` above its `limit`, or one that is not a number, the
                row has failed.
        """
        began = time.monotonic()
        values: dict[str, Any] = {}
        reason = ""
        if began - self._began > 60 * self._minutes:
            outcome: Outcome = "no time left"
        else:
            try:
                values = measure()
                outcome = _verdict(values)
            except NotHere as error:
                outcome, reason = "not here", str(error)
            except torch.OutOfMemoryError as error:
                outcome, reason = "out of memory", _one_line(error)
            except Exception as error:
                outcome, reason = "FAILED", _one_line(error)
        _release_memory()  # only now: the exception held the frames, and the frames their tensors
        seconds = {"row_seconds": round(time.monotonic() - began, 1)}
        self.rows.append({"row": name, "outcome": outcome, **values, "reason": reason, **seconds})
        self._write()
        print(" ".join(f"{key}: {_shown(value)}" for key, value in self.rows[-1].items() if value != ""), flush=True)
        return outcome

    @property
    def failed(self) -> list[str]:
        """Names of the rows that failed."""
        return [row["row"] for row in self.rows if row["outcome"] == "FAILED"]

    def _write(self) -> None:
        document = {"part": self._part, "about": self._about, "rows": self.rows}
        write_atomic(self._stem.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
        write_atomic(self._stem.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        """The page: what it was run with, then one line per row."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        columns = [key for key in columns if any(row.get(key) not in ("", None) for row in self.rows)]
        lines = [f"# GPU kit: {self._part}", "", *(f"- {key}: {value}" for key, value in self._about.items()), ""]
        lines += [f"| {' | '.join(columns).replace('_', ' ')} |", f"|{'---|' * len(columns)}"]
        lines += [
            f"| {' | '.join(_shown(row.get(key, '')).replace('|', '/') for key in columns)} |" for row in self.rows
        ]
        return "\n".join(lines) + "\n"


def _verdict(values: dict[str, Any]) -> Outcome:
    if "deviation" not in values:
        return "measured"
    return "passed" if values["deviation"] <= values["limit"] else "FAILED"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:LONGEST_REASON]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
