"""The layout: which module may import which."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.helpers import ROOT

METHOD = {"utils.losses", "utils.negatives", "utils.attacks", "utils.step"}
# A module imports its own layer and those after it.
LAYERS = ["training", "evaluation", "figures", "data", "system", "method", "models"]


def module_name(file: Path) -> str:
    """`utils/data/subject.py` -> utils.data.subject; a package's __init__ -> the package's name."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_by(file: Path) -> set[str]:
    """Names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


PACKAGES = [
    file for package in ("utils", "models") for file in sorted((ROOT / package).rglob("*.py"))
]
FILES = {module_name(file): file for file in PACKAGES}
IMPORTS = {name: imported_by(file) & FILES.keys() - {name} for name, file in FILES.items()}


def layer(name: str) -> str | None:
    """Return a module's name in LAYERS, which is that of its folder; None for utils itself."""
    if name in METHOD:
        return "method"
    parts = name.split(".")
    if parts[0] == "models":
        return "models"
    return parts[1] if len(parts) > 1 else None


def test_there_is_no_import_circle():
    packages = {name for name, file in FILES.items() if file.name == "__init__.py"}
    graph = {name: others - packages for name, others in IMPORTS.items() if name not in packages}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(graph)


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"utils"}))
def test_imports_point_down_the_layers(name):
    for other in IMPORTS[name] - {"utils"}:
        assert LAYERS.index(layer(other)) >= LAYERS.index(layer(name)), other
