"""The layout: which module may import which, and names that are written in two places."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.helpers import ROOT

METHOD = {"utils.losses", "utils.negatives", "utils.attacks", "utils.step"}
# Modules of a folder import the method, the models, their own folder and the folders after it.
FOLDERS = ["training", "evaluation", "figures", "data", "system"]


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


def folder_of(name: str) -> str | None:
    """Return the folder of utils that a module lies in; None for the method and for packages."""
    parts = name.split(".")
    return parts[1] if len(parts) == 3 else None


def test_there_is_no_import_circle():
    packages = {"utils", "models"} | {f"utils.{folder}" for folder in FOLDERS}
    graph = {name: others - packages for name, others in IMPORTS.items() if name not in packages}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(graph)


@pytest.mark.parametrize("name", sorted(METHOD))
def test_the_method_imports_the_models_and_itself(name):
    others = {other for other in IMPORTS[name] if other.startswith("utils.")}
    assert others <= METHOD


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("models")))
def test_the_models_import_the_models_alone(name):
    assert all(other.startswith("models") for other in IMPORTS[name])


def test_imports_point_down_the_folders():
    for name, others in IMPORTS.items():
        folder = folder_of(name)
        if folder is None:
            continue
        for other in others:
            below = folder_of(other)
            if below is not None:
                assert FOLDERS.index(below) >= FOLDERS.index(folder), f"{name} imports {other}"
