"""docs/configuration.md: fresh, complete, with a meaning and a known source for every field."""

from collections import Counter
from pathlib import Path
from typing import get_args, get_origin

import pytest

from common.config import SECTIONS as SECTION_NAMES
from common.config import Section
from tools.configuration_page import LEGEND, PAGE, SECTIONS, default_of, main, page, rows
from tools.field_text import TAG


def cells(text: str) -> list[list[str]]:
    """The tables' rows: key, type, default, meaning, source."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.replace(r"\|", "¦").strip("|").split("|")] for line in lines]


def leaves(schema: type[Section], path: str) -> list[str]:
    """Keys of the fields that hold values, found by validation's own view of the class."""
    found = []
    for name, field in schema.model_fields.items():
        kind, parts = get_origin(field.annotation), get_args(field.annotation)
        inner = [part for part in (field.annotation, *parts) if isinstance(part, type)]
        inner = [part for part in inner if issubclass(part, Section)]
        if not inner:
            found.append(f"{path}.{name}")
        else:
            suffix = {dict: ".<>", tuple: "[]"}.get(kind, "")
            found += leaves(inner[0], f"{path}.{name}{suffix}")
    return found


def without_placeholders(key: str) -> str:
    for placeholder in ("<network>", "<stage>", "<name>"):
        key = key.replace(placeholder, "<>")
    return key.strip("`")


def test_the_page_is_fresh():
    assert PAGE.read_text() == page(), "run python -m tools.configuration_page"


def test_every_field_is_on_the_page_once():
    assert tuple(SECTIONS) == SECTION_NAMES
    expected = [key for name, schema in SECTIONS.items() for key in leaves(schema, name)]
    assert "trainer.dual_stream.head.hidden_channels" in expected
    assert "trainer.lora.<>.rank" in expected
    assert Counter(without_placeholders(row[0]) for row in cells(page())) == Counter(expected)


def test_every_row_has_type_default_and_meaning():
    for row in cells(page()):
        assert len(row) == 5, row
        assert all(row[:4]), f"{row[0]}: add a comment above the field"


def test_every_tag_is_in_the_legend():
    used = {tag for row in cells(page()) for tag in TAG.findall(row[4])}
    assert used
    assert {tag.partition(":")[0].partition(",")[0] for tag in used} <= LEGEND.keys()


def test_no_tag_is_left_in_a_meaning():
    assert not [row for row in cells(page()) if TAG.search(row[3])]


class Optimizer(Section):
    """AdamW [peer]."""

    #: peak learning rate
    rate: float
    #: β in [0, 1) and
    #: no unit [paper, Tab. 2]
    beta: float = 0.9  # as published


class Stage(Section):
    """A stage."""

    optimizer: Optimizer = Optimizer(rate=1e-5, beta=0.5)  # [ours]


def test_a_section_is_the_source_of_the_values_it_changes():
    _, rate, beta = rows(Stage, "stage", {"": Stage()})
    assert rate == ("stage.optimizer.rate", "float", "`1e-05` (required)", "peak learning rate", "[ours]")
    assert beta[2:] == ("`0.5` (`0.9`)", "β in [0, 1) and no unit as published", "[ours]")


def test_fields_at_their_class_defaults_keep_their_own_source():
    rate, beta = rows(Optimizer, "optimizer", {"": default_of(Optimizer)})
    assert (rate.default, rate.source) == ("required", "[peer]")
    assert (beta.default, beta.source) == ("`0.9`", "[paper, Tab. 2]")


def test_check_refuses_an_outdated_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tools.configuration_page.PAGE", tmp_path / "configuration.md")
    monkeypatch.setattr("sys.argv", ["configuration_page", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        main()
    monkeypatch.setattr("sys.argv", ["configuration_page"])
    main()
    monkeypatch.setattr("sys.argv", ["configuration_page", "--check"])
    main()
