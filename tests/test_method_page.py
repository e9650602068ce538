"""docs/method.md names what exists: functions, configuration fields, tests; and leaves no loss and no line out."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from common.config import Section
from datagen.config import DatagenConfig
from pipeline.model.config import ModelConfig
from preference.config import PreferenceConfig
from tools.configuration_page import LEGEND
from tools.field_text import comment_of
from trainer.config import TrainerConfig
from trainer.stages import losses

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "method.md").read_text()
SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "datagen": DatagenConfig,
    "trainer": TrainerConfig,
    "preference": PreferenceConfig,
}


def rows(page: str) -> list[list[str]]:
    """Cells of the rows of all tables; the last three are function, fields, test."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[-1].strip() != "test"]


def check(row: list[str]) -> None:
    """
    Raises:
        AssertionError: naming what does not exist.
    """
    function, fields, test = (re.findall(r"`([^`]+)`", cell) for cell in row[-3:])
    assert len(function) == len(test) == 1, row
    module, _, name = function[0].partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"no {function[0]}"
        found = getattr(found, part)
    for field in fields:
        assert field_of(field) is not None, f"no field {field}"
    file, _, test_name = test[0].partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert test_name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"no {test[0]}"


def field_of(path: str) -> Any:
    """The field at a key path, None where there is none."""
    section, *keys = path.split(".")
    schema: Any = SECTIONS.get(section)
    field = None
    for key in keys:
        field = getattr(schema, "model_fields", {}).get(key)
        if field is None:
            return None
        parts = (field.annotation, *get_args(field.annotation))
        schema = next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)
    return field


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row[0][:40])
def test_a_row_names_what_exists(row: list[str]) -> None:
    check(row)


@pytest.mark.parametrize("index", [-3, -2, -1])
def test_a_name_that_does_not_exist_is_found(index: int) -> None:
    row = next(row for row in rows(PAGE) if "`" in row[-2]).copy()
    row[index] = re.sub(r"`([^`]+)`", r"`\1x`", row[index])
    with pytest.raises(AssertionError, match="no "):
        check(row)


def test_the_27_lines_of_algorithm_1_are_there_once_each() -> None:
    numbers = [int(row[0]) for row in rows(PAGE) if row[0].isdigit()]
    assert numbers == list(range(1, 28))
    source = (ROOT / "trainer/stages/dual_stream/algorithm.py").read_text()
    named: set[int] = set()
    for first, more in re.findall(r"[Ll]ines? (\d+)((?:-\d+|(?:, \d+)*))", source):
        if more.startswith("-"):
            continue  # a docstring's span, not a line's own number
        named |= {int(first), *(int(number) for number in re.findall(r"\d+", more))}
    assert set(range(2, 28)) - {9, 10, 11, 12} <= named, "the code carries the numbers of all lines"
    assert "Lines 9-12" in source


def test_every_loss_is_named() -> None:
    functions = [
        name
        for name, value in vars(losses).items()
        if inspect.isfunction(value) and value.__module__ == losses.__name__ and not name.startswith("_")
    ]
    assert len(functions) >= 12
    for name in functions:
        assert f"`trainer.stages.losses:{name}`" in PAGE


def paper_fields(schema: type[Section], path: str) -> list[str]:
    """Key paths of the fields whose comment has the tag [paper]."""
    found = []
    for name, field in schema.model_fields.items():
        key = f"{path}.{name}"
        if "[paper" in comment_of(schema, name):
            found.append(key)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += paper_fields(field.annotation, key)
    return found


def test_every_number_of_the_paper_is_named() -> None:
    assert "paper" in LEGEND
    fields = [key for section, schema in SECTIONS.items() for key in paper_fields(schema, section)]
    assert len(fields) > 8
    for key in fields:
        assert f"`{key}`" in PAGE, f"docs/method.md does not name {key}"
