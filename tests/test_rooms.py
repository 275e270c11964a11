"""Arrows between rooms point one way, and no two files import each other: also inside functions and for types."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PROJECT = Path(__file__).parents[1]
MAY_IMPORT = {  # room -> the rooms that its files may import; a file directly in `pile_app/` is in the room `documents`
    "documents": {"documents"},
    "data": {"documents", "data"},
    "prepare": {"documents", "data", "prepare"},
    "model": {"documents", "data", "model"},
    "training": {"documents", "data", "model", "training"},
    "tasks": {"documents", "data", "prepare", "model", "training", "tasks"},
    "commands": {"documents", "data", "prepare", "model", "training", "tasks", "commands"},
}


def imported(path: Path) -> set[str]:
    """Modules of `pile_app` that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return {name for name in names if name.startswith("pile_app.") and module_path(name).exists()}


def module_path(name: str) -> Path:
    return PROJECT / (name.replace(".", "/") + ".py")


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 2 else "commands" if parts[1] == "cli" else "documents"


def modules() -> list[str]:
    paths = sorted((PROJECT / "pile_app").rglob("*.py"))
    names = [".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in paths if path.name != "__init__.py"]
    return [name for name in names if room(name) in MAY_IMPORT]


def test_no_room_imports_one_that_comes_before_it() -> None:
    wrong = [
        (name, other)
        for name in modules()
        for other in imported(module_path(name))
        if room(other) not in MAY_IMPORT[room(name)]
    ]
    assert not wrong


def test_no_two_files_import_each_other() -> None:
    graph = {name: imported(module_path(name)) for name in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"files import each other: {' -> '.join(error.args[1])}") from None
