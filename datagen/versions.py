"""What decides the bytes of a sample beside the plan: libraries, and our own code."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from datagen.shards import SCHEMA_VERSION

#: how a video becomes z_hr: decoded, cropped, encoded
ENCODING_CODE = (
    "datagen.clip",
    "datagen.encode",
    "datagen.media",
    "datagen.windows",
    "pipeline.tiny_vae",
    "pipeline.vae",
)
#: how HR becomes LR
DEGRADATION_CODE = (
    "datagen.codec",
    "datagen.degrade",
    "datagen.kernels",
    "datagen.noise",
    "datagen.operations",
    "datagen.recipe",
    "pipeline.seeding",
)
#: what the survey measures; its finished parts are taken over only where it is the same
SURVEY_CODE = ("datagen.media", "datagen.survey")


def code_versions() -> dict[str, str]:
    """Versions that decide the bytes of a sample."""
    packages = ("duo-vsr", "av", "numpy", "opencv-python-headless", "safetensors", "torch")
    return {
        "schema": str(SCHEMA_VERSION),
        "encoding": modules_hash(ENCODING_CODE),
        "degradation": modules_hash(DEGRADATION_CODE),
    } | {package: version(package) for package in packages}


def modules_hash(modules: Iterable[str]) -> str:
    """Of what modules do: comments, docstrings and layout do not count."""
    return code_hash(Path(_origin(module)).read_text() for module in modules)


def code_hash(sources: Iterable[str]) -> str:
    """The first 16 digits of sha256 over the syntax trees of Python `sources`, without their docstrings.

    Trees may look different to another minor version of Python, which then counts as a change.
    """
    digest = hashlib.sha256()
    for source in sources:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                node.body = [statement for statement in node.body if not _is_text(statement)]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _origin(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return spec.origin
