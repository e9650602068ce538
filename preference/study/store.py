"""The files of a study: `key.json`, `clips/`, and one file of answers per rater, replaced atomically by each answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from common.atomic import write_atomic
from common.errors import UserError
from preference.study.trials import CHOICES, QUESTIONS, SAME, Study

KEY, CLIPS, ANSWERS = "key.json", "clips", "answers"
_NAME = re.compile(r"[\w-]{1,40}", re.ASCII)

#: trial (as text) -> question -> left, same or right
Answers = dict[str, dict[str, str]]


def read_study(folder: Path) -> Study:
    """The study in `folder`.

    Raises:
        UserError: none there.
    """
    return Study.from_document(_read(folder / KEY), str(folder / KEY))


class AnswerSheet:
    """The answers of one rater, as they lie on the disk.

    Raises:
        UserError: a name that is no file's name, or answers to another study.
    """

    def __init__(self, folder: Path, study: Study, rater: str) -> None:
        if not _NAME.fullmatch(rater):
            raise UserError("a name is 1 to 40 letters, digits, - or _")
        self.rater, self.trials = rater, study.trials(rater)
        self._path = folder / ANSWERS / f"{rater}.json"
        # What was on which side is kept beside the answers: another draw must not turn them around.
        sides = [[trial.pair.file, trial.left, trial.right] for trial in self.trials]
        self._asked = {"study": study.identity, "rater": rater, "trials": sides}
        self.answers: Answers = {}
        if self._path.exists():
            document = _read(self._path)
            if any(document.get(name) != value for name, value in self._asked.items()):
                raise UserError(f"{self._path} belongs to another study than {folder / KEY}")
            self.answers = document["answers"]

    def answer(self, trial: int, question: str, choice: str) -> None:
        """Keep one answer, in place of an earlier one to the same question; on the disk when this returns.

        Raises:
            UserError: no such trial, question or choice.
        """
        if not 0 <= trial < len(self.trials) or question not in QUESTIONS or choice not in CHOICES:
            raise UserError(f"answer {choice!r} to {question!r} of trial {trial} is none that was asked for")
        self.answers.setdefault(str(trial), {})[question] = choice
        document = self._asked | {"answers": self.answers}
        write_atomic(self._path, json.dumps(document, indent=1, sort_keys=True) + "\n")

    def counted(self) -> list[tuple[str, str, str, str, int]]:
        """Each answer as (reference, other, clip, question, +1, 0 or -1: for the reference, same, against)."""
        rows = []
        for number, given in self.answers.items():
            trial = self.trials[int(number)]
            for question, choice in given.items():
                chosen = {"left": trial.left, "right": trial.right}.get(choice)
                value = 0 if choice == SAME else 1 if chosen == trial.pair.reference else -1
                rows.append((trial.pair.reference, trial.pair.other, trial.pair.clip, question, value))
        return rows


def read_sheets(folder: Path, study: Study) -> list[AnswerSheet]:
    """All raters that have answered, by name."""
    files = sorted(path for path in (folder / ANSWERS).glob("*.json") if not path.name.startswith("."))
    return [AnswerSheet(folder, study, path.stem) for path in files]


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except json.JSONDecodeError:
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is neither a key nor the answers of a study")
    return document
