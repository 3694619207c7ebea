"""The layout: which module may import which."""

import ast
import graphlib

import pytest

from tests.helpers import ROOT

METHOD = {"utils.losses", "utils.negatives", "utils.attacks", "utils.step"}
# A module imports its own layer and those after it.
LAYERS = ["training", "evaluation", "figures", "data", "system", "method", "models"]


def module_name(file):
    """`utils/data/subject.py` -> utils.data.subject; a package's __init__ -> the package's name."""
    path = file.relative_to(ROOT).with_suffix("")
    name = ".".join(path.parts)
    return name.removesuffix(".__init__")


def imported_by(file):
    """Names of all modules that a file imports, inside functions too."""
    names = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


PACKAGES = [*(ROOT / "utils").rglob("*.py"), *(ROOT / "models").rglob("*.py")]
FILES = {module_name(file): file for file in PACKAGES}
IMPORTS = {name: imported_by(file) & FILES.keys() for name, file in FILES.items()}


def layer(name):
    """Return a module's name in LAYERS, which is that of its folder; None for utils itself."""
    if name in METHOD:
        return "method"
    package, *folder = name.split(".")
    if package == "models":
        return "models"
    return folder[0] if folder else None


def test_there_is_no_import_circle():
    graph = {}
    for name, file in FILES.items():
        if file.name != "__init__.py":
            graph[name] = IMPORTS[name]
    order = graphlib.TopologicalSorter(graph).static_order()
    assert graph.keys() <= set(order)


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"utils"}))
def test_imports_point_down_the_layers(name):
    allowed = LAYERS[LAYERS.index(layer(name)) :]
    for other in IMPORTS[name] - {"utils"}:
        assert layer(other) in allowed, other
