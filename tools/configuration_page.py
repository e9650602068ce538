"""Write docs/configuration.md from the configuration classes: every field with type, default, meaning and source.

    python -m tools.configuration_page [--check]

Types and defaults are read from the classes, meaning and source from the comments of the fields
(tools/field_text.py). A tag on a nested section is the source of the values it changes; a tag in a class's
docstring is that of its fields without one.
`--check` writes nothing and exits 1 if the page is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

from common.atomic import write_atomic
from common.config import Section
from common.errors import run_command
from common.storage import StorageConfig
from datagen.config import DatagenConfig
from pipeline.model.config import ModelConfig
from preference.config import PreferenceConfig
from tools.field_text import comment_of, default_text, split_tags, type_text
from trainer.config import TrainerConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "storage": StorageConfig,
    "datagen": DatagenConfig,
    "trainer": TrainerConfig,
    "preference": PreferenceConfig,
}
LEGEND = {
    "paper": "given in the DUO-VSR paper or its supplement",
    "note": "our reading of the method's notes where the paper is silent",
    "peer": "taken from a published codebase or paper, named where it is one in particular",
    "ours": "our choice",
}
#: what stands for a key that the user names; `<name>` elsewhere
KEYS = {"trainer.lora": "<network>", "trainer.schedules": "<stage>"}
HEAD = """# Configuration

Written by `python -m tools.configuration_page` from the configuration classes; edit their comments, not this page.

A value is set in the preset under its key, or for one run by `--set section.field=value` (repeatable, the value is \
YAML); `--print-config` prints the resolved configuration and exits.

The last column is the source of the default: {legend}. \
A nested section that is given in part takes the rest from its class: the default in parentheses.
"""


class Row(NamedTuple):
    """One field of the page; `type` is empty for the heading of a nested section."""

    key: str
    type: str
    default: str
    meaning: str
    source: str


def rows(schema: type[Section], path: str, values: Mapping[str, Any], given: str = "") -> Iterator[Row]:
    """The heading of a section, its own fields, then its nested sections.

    Args:
        values: default instances by a name shown where their defaults differ; one instance has the name "".
        given: source of the values in which the default instance differs from its class.
    """
    nested, class_defaults = [], default_of(schema)
    for name, field in schema.model_fields.items():
        key = f"{path}.{name}"
        meaning, source = split_tags(comment_of(schema, name))
        defaults: dict[str, Any] = {label: getattr(value, name, ...) for label, value in values.items()}
        inner = section_in(field.annotation)
        if inner is None:
            default, alone = default_text(defaults), default_text({"": getattr(class_defaults, name, ...)})
            changed = default != alone and "" in defaults
            source = (given if changed else "") or source or split_tags(schema.__doc__)[1]
            shown = f"{default} ({alone})" if changed else default
            yield Row(key, type_text(field.annotation, field.metadata), shown, meaning, source)
            continue
        if get_origin(field.annotation) is dict:
            key = f"{key}.{KEYS.get(key, '<name>')}"
            defaults = dict(defaults[""]) or {"": default_of(inner)}
        elif get_origin(field.annotation) is tuple:
            key, defaults = f"{key}[]", {"": default_of(inner)}
        elif type(None) in get_args(field.annotation):
            meaning = f"{meaning or split_tags(inner.__doc__)[0].rstrip('.')}; null leaves it out"
        intro = (meaning or split_tags(inner.__doc__)[0]).rstrip(".") + "."
        nested.append((Row(key, "", "", intro, ""), inner, defaults, source or given))
    for heading, inner, defaults, source in nested:
        yield heading
        yield from rows(inner, heading.key, defaults, source)


def default_of(schema: type[Section]) -> Section:
    """An instance with every default; required fields are missing."""
    required = any(field.is_required() for field in schema.model_fields.values())
    return schema.model_construct() if required else schema()


def section_in(annotation: Any) -> type[Section] | None:
    """The section class that a field holds: itself, or null, or a mapping or list of them."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (dict, tuple, Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := section_in(part))), None)
    return None


def page() -> str:
    """The page, Markdown."""
    blocks = [HEAD.format(legend="; ".join(f"**[{tag}]** {text}" for tag, text in LEGEND.items()))]
    for name, schema in SECTIONS.items():
        blocks.append(f"\n## {name}\n\n{split_tags(schema.__doc__)[0]}\n")
        above = ""
        for row in rows(schema, name, {"": default_of(schema)}):
            if not row.type:
                blocks.append(f"\n### `{row.key}`\n\n{row.meaning[:1].upper()}{row.meaning[1:]}\n")
            elif not above:
                blocks.append("\n| key | type | default | meaning | source |\n|---|---|---|---|---|\n")
            if row.type:
                cells = " | ".join(cell.replace("|", r"\|") for cell in (f"`{row.key}`", *row[1:]))
                blocks.append(f"| {cells} |\n")
            above = row.type
    return "".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is out of date")
    if not parser.parse_args().check:
        write_atomic(PAGE, page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit(f"{PAGE.name} is out of date; run python -m tools.configuration_page")


if __name__ == "__main__":
    run_command(main)
