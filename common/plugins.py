"""Stages, metrics and degradation operations from outside the repository, named `package.module:NAME`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, TypeVar

from common.errors import UserError

T = TypeVar("T")


def load_object(reference: str, kind: type[T], *, option: str) -> T:
    """The object at `package.module:NAME`, an instance of `kind`. The working directory is searched too.

    Args:
        option: command line option or configuration field that gave `reference`, for the errors.

    Raises:
        UserError: it cannot be imported, has no such name, or is of another kind.
    """
    found = _load(reference, option)
    if not isinstance(found, kind):
        raise UserError(f"{option} {reference}: {type(found).__name__} is not a {kind.__name__}")
    return found


def load_class(reference: str, base: type[T], *, option: str) -> type[T]:
    """The class at `package.module:NAME`, a subclass of `base`; otherwise like `load_object`."""
    found = _load(reference, option)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{option} {reference}: it is not a subclass of {base.__name__}")
    return found


def _load(reference: str, option: str) -> Any:
    module_name, _, name = reference.partition(":")
    if not (module_name and name):
        raise UserError(f"{option} {reference}: write package.module:NAME")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{option} {reference}: {error}; run the command where {module_name.partition('.')[0]} can be imported, "
            "or add its folder to PYTHONPATH"
        ) from None
    try:
        return getattr(module, name)
    except AttributeError:
        raise UserError(f"{option} {reference}: {module.__file__} has no {name}") from None
