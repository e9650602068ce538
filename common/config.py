"""One YAML file per preset, one section per room, every field typed and checked before work starts.

    model:       pipeline/model/config.py
    storage:     common/storage.py
    datagen:     datagen/config.py
    trainer:     trainer/config.py
    preference:  preference/config.py

A command reads its own section and `model`; the names of the others are only checked for spelling. A file may
begin with `extends: other.yaml` (relative to itself) and give only what differs, as those of configs/ablations/ do.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError

SECTIONS = ("model", "storage", "datagen", "trainer", "preference")


class Section(BaseModel):
    """Base of every configuration class: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    #: old names of keys -> where the value is given now, as a full path; an old name is refused with the new one
    renamed: ClassVar[dict[str, str]] = {}


SectionType = TypeVar("SectionType", bound=Section)


def load_section(
    path: str | Path | None, name: str, schema: type[SectionType], overrides: list[str] | None = None
) -> SectionType:
    """Read section `name` of the YAML file `path`, apply overrides, validate.

    Args:
        path: None: every value has its default but for the overrides.
        overrides: `section.field.subfield=value` strings from the command line (`--set`); the value is YAML.
            Those of other sections are ignored here, so one list serves all sections of a command.

    Raises:
        UserError: naming file, field, value and remedy.
    """
    document = {} if path is None else _read(Path(path))
    path = path or "--set"
    for override in overrides or []:
        _apply(document, override)
    _check_names(document, path)
    try:
        return schema.model_validate(document.get(name) or {})
    except ValidationError as error:
        raise UserError(_explain(error, Path(path), name, schema)) from None


def resolved_yaml(**sections: Section) -> str:
    """The configuration as it will run, defaults filled in, as YAML."""
    plain = {name: section.model_dump(mode="json") for name, section in sections.items()}
    return yaml.safe_dump(plain, sort_keys=False)


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in extending:
        raise UserError(f"{path} extends itself; give the preset it starts from")
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}; the presets are in configs/") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold sections ({', '.join(SECTIONS)}), not {type(document).__name__}")
    parent = document.pop("extends", None)
    if parent is None:
        return document
    return _merge(_read(path.parent / str(parent), (*extending, path.resolve())), document)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """`parent` with the values of `child`; only mappings are merged, anything else is replaced."""
    merged = dict(parent)
    for name, value in child.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply(document: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    if not equals or len(keys) < 2:
        raise UserError(f"--set {override!r}: write section.field=value, for instance trainer.seed=1")
    node = document
    for key in keys[:-1]:
        child = node.get(key)
        node[key] = dict(child) if isinstance(child, dict) else {}
        node = node[key]
    node[keys[-1]] = yaml.safe_load(value)


def _check_names(document: dict[str, Any], path: str | Path) -> None:
    for name in document:
        if name not in SECTIONS:
            raise UserError(f"{path}: unknown section {name!r}{_suggest(str(name), SECTIONS)}")


def _suggest(name: str, known: Any) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _explain(error: ValidationError, path: Path, section: str, schema: type[BaseModel]) -> str:
    first = error.errors()[0]
    field = ".".join([section, *(str(part) for part in first["loc"])])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        if new_name := _renamed(schema, first["loc"]):
            return f"{path}: {field} is now called {new_name}; rename it{more}"
        return f"{path}: unknown key {field}{_suggest(str(first['loc'][-1]), _fields(schema, first['loc']))}{more}"
    if first["type"] == "missing":
        return f"{path}: {field} is missing; add it{more}"
    message, value = first["msg"].removeprefix("Value error, "), first["input"]
    if isinstance(value, dict):  # of a whole section, what the message is about
        value = {name: part for name, part in value.items() if re.search(rf"\b{name}\b", message)}
    shown = "" if value == {} else f" = {value!r}"
    return f"{path}: {field}{shown}: {message}{more}"


def _fields(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names that would be right at `location`, for the suggestion."""
    return list(getattr(_section_at(schema, location), "model_fields", {}))


def _renamed(schema: type[BaseModel], location: tuple[int | str, ...]) -> str | None:
    """The new name of the key at `location`, if it is an old one."""
    return getattr(_section_at(schema, location), "renamed", {}).get(location[-1])


def _section_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> Any:
    """The configuration class that holds the key at `location`."""
    current: Any = schema
    for part in location[:-1]:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        current = field.annotation
        for candidate in getattr(current, "__args__", ()):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                current = candidate
    return current
