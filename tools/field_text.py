"""What the reference of the configuration says about a field: its type, its default and its comment.

The comment of a field is its `#:` lines above and what stands at the end of its own lines. A tag in square brackets is
the source of its value: `#: β, constant [peer: Diffusion-DPO]`.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import tokenize
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from common.config import Section

#: a tag starts with a word in ASCII, which keeps intervals such as [0, 1] and [π/3, π] in the text
TAG = re.compile(r"\s*\[([A-Za-z][^\]]*)\]")
CONSTRAINTS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "min_length": "(at least {})"}


def type_text(annotation: Any, metadata: Any = ()) -> str:
    """A type with its constraints, for people: `float > 0`, `2 × int`, `a | b`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    limits = [
        text.format(getattr(limit, name))
        for limit in (part for entry in metadata for part in (getattr(entry, "metadata", None) or [entry]))
        for name, text in CONSTRAINTS.items()
        if hasattr(limit, name)
    ]
    if origin is Annotated:
        return type_text(parts[0], [*annotation.__metadata__, *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_text(part, metadata) for part in parts)
    if origin is Literal:
        text = "one of " + ", ".join(f"`{part}`" for part in parts)
    elif origin is tuple:
        text = f"{'list of' if parts[-1] is ... else f'{len(parts)} ×'} {type_text(parts[0])}"
    elif origin is dict:
        text = f"mapping from {type_text(parts[0])} to {type_text(parts[1])}"
    else:
        text = {Any: "any value", Path: "path"}.get(annotation) or annotation.__name__
    return " ".join([text, ", ".join(limits)]).strip()


def default_text(defaults: Mapping[str, Any]) -> str:
    """The default as it is written in YAML; of several instances, each where they differ."""
    texts = {label: "required" if value is ... else f"`{plain(value)}`" for label, value in defaults.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{label}: {text}" for label, text in texts.items())


def plain(value: Any) -> str:
    """A value in YAML's flow style; floats with six significant digits where they have more."""
    rounded = json.loads(json.dumps(value, default=str), parse_float=lambda text: float(f"{float(text):.6g}"))
    return value if isinstance(value, str) and value else json.dumps(rounded, ensure_ascii=False)


def split_tags(text: str | None) -> tuple[str, str]:
    """The first paragraph of a comment or docstring without its tags, and the tags."""
    paragraph = " ".join((text or "").split("\n\n")[0].split())
    return TAG.sub("", paragraph).strip(" ;"), ", ".join(f"[{tag}]" for tag in TAG.findall(paragraph))


def comment_of(schema: type[Section], name: str) -> str:
    """The comment of a field, from the class that declares it."""
    owner = next(base for base in schema.__mro__ if name in inspect.get_annotations(base))
    return comments_in(inspect.getsourcefile(owner) or "")[owner.__qualname__, name]


@cache
def comments_in(file: str) -> dict[tuple[str, str], str]:
    """Comments of the annotated names of every class of a source file, by class and name."""
    source = Path(file).read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for owner in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)):
        for node in owner.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while comments.get(first - 1, "").startswith("#:"):
                    first -= 1
                lines = [comments[n] for n in range(first, (node.end_lineno or first) + 1) if n in comments]
                found[owner.name, node.target.id] = " ".join(line.lstrip("#: ") for line in lines)
    return found
