"""The rooms of docs/architecture.md: no import points upward, no circles."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: room -> rooms (or single modules of a room) it may import besides itself
ALLOWED = {
    "common": set(),
    "pipeline": {"common"},
    "metrics": {"common"},
    "datagen": {"common", "pipeline", "metrics"},
    "trainer": {"common", "pipeline", "metrics", "datagen.dataset"},
    "preference": {"common", "pipeline", "metrics", "datagen.dataset"},
    "launchers": set(),
    "demo": {"launchers"},
}


@cache
def modules() -> dict[str, Path]:
    files = (path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imports(path: Path, *, at_start: bool = False) -> set[str]:
    """Our own modules that a file imports: everywhere, or only while it is itself being imported."""
    return {name for name in all_imports(path, at_start=at_start) if name.partition(".")[0] in ALLOWED}


def all_imports(path: Path, *, at_start: bool = False) -> set[str]:
    """The same with libraries."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if at_start:
        inner = [n for f in nodes if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)]
        inner += [
            n for i in nodes if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in ast.walk(i)
        ]
        nodes = [node for node in nodes if node not in set(inner)]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            found |= inside or {str(node.module)}
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_import_points_upward(name):
    room = name.partition(".")[0]
    allowed = ALLOWED[room] | {room}
    for imported in imports(modules()[name]):
        assert any(imported == place or imported.startswith(f"{place}.") for place in allowed), (
            f"{name} imports {imported}; {room} may import only {sorted(allowed)}"
        )


def test_no_circles():
    graph = {name: imports(path, at_start=True) & modules().keys() for name, path in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_the_check_sees_an_import_inside_a_function(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text("import json\ndef f():\n    from trainer.loop import train\n")
    assert imports(file) == {"trainer.loop"}
    assert imports(file, at_start=True) == set()
