"""The house: what may import what, and names that are written in two places."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

from tests.helpers import ROOT, SCRIPTS

FLOORS = {  # each imports from its own floor or from those below it
    "scripts": [],
    "jobs": ["training", "robustness", "report", "diagnostics", "features"],
    "method": ["companions", "losses", "negatives", "attacks", "step", "adaptive", "autoattack"],
    "material": ["data", "evaluation", "checkpoints", "runs", "figures"],
    "ground": [
        "recipes",
        "command",
        "options",
        "errors",
        "files",
        "distributed",
        "devices",
        "graphs",
        "provenance",
        "results",
    ],
    "models": [],
}
METHOD = ("losses", "negatives", "attacks", "step")  # what a researcher reads, copies and changes
BOOKKEEPING = {"options", "command", "files", "checkpoints", "runs", "training"}
PARSING = {"argparse", "json", "pathlib"}
OF_DISTRIBUTED = {"own_slice", "own_weight", "joined", "total", "world"}


def name_of(file):
    """`utils/step.py` -> utils.step; a package's __init__ -> its own name."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(f): f for folder in ("utils", "models") for f in sorted((ROOT / folder).glob("*.py"))}
SOURCES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}


def imports(tree):
    """Every import of a module, inside functions and for type checking too -> (module, names or None for all)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports here name the package"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, None) if inner in FILES else (node.module, {alias.name})


def own(name):
    """Modules of the repository that one imports."""
    return {module for module, _ in imports(SOURCES[name]) if module in FILES}


def floor(name):
    """How high a module lies, 0 on top."""
    package, _, room = name.partition(".")
    if package == "models":
        return len(FLOORS) - 1
    found = [i for i, rooms in enumerate(FLOORS.values()) if room in rooms]
    assert found, f"{name} stands on no floor yet: name it in FLOORS, and in the README's reading order"
    return found[0]


def rooms():
    """Modules of the two packages but for utils/__init__, which is nearly empty."""
    return [name for name in FILES if name != "utils"]


def below(name):
    """A module and everything of the repository that it imports, whatever way round."""
    seen, waiting = set(), [name]
    while waiting:
        here = waiting.pop()
        if here not in seen:
            seen.add(here)
            waiting += own(here)
    return seen


def test_imports_go_round_in_no_circle():
    order = graphlib.TopologicalSorter({name: own(name) - {name} for name in FILES})
    assert set(order.static_order()) == set(FILES)  # raises CycleError where there is one


def test_every_room_on_a_floor_is_there():
    named = {f"utils.{room}" for rooms_of_floor in FLOORS.values() for room in rooms_of_floor}
    assert named == {name for name in rooms() if name.startswith("utils.")}


@pytest.mark.parametrize("name", rooms())
def test_no_import_runs_upward(name):
    for other in own(name):
        assert floor(other) >= floor(name), f"{name} imports {other} from a floor above"


@pytest.mark.parametrize("room", METHOD)
def test_the_method_knows_no_files_and_no_flags(room):
    names = below(f"utils.{room}")
    assert not names & {f"utils.{other}" for other in BOOKKEEPING}
    for name in names:
        for module, taken in imports(SOURCES[name]):
            assert module.partition(".")[0] not in PARSING, f"{room} reaches {module} by {name}"
            if module == "utils.distributed":
                assert taken is not None and taken <= OF_DISTRIBUTED, (name, taken)


@pytest.mark.parametrize("room", ["negatives", "recipes"])
def test_two_rooms_stand_alone(room):
    assert not own(f"utils.{room}")


def test_the_models_import_nothing_of_utils():
    assert not {other for name in FILES if name.startswith("models") for other in own(name) if "utils" in other}


@pytest.mark.parametrize("name", [*FILES])
def test_text_is_utf8_on_every_system(name):
    """Each text file that is opened says so: Windows would take its own encoding."""
    for call in (node for node in ast.walk(SOURCES[name]) if isinstance(node, ast.Call)):
        function = ast.unparse(call.func)
        opens = function.split(".")[-1] in ("open", "read_text", "write_text") and function not in (
            "os.open",
            "Image.open",
        )
        said = [ast.unparse(part) for part in (*call.args, *call.keywords)]
        if opens and not any(re.fullmatch(r"'[rwa]b'", part) for part in said):
            assert "encoding='utf-8'" in said, f"{name}: {ast.unparse(call)}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_a_docstring_and_one_call(script):
    tree = ast.parse((ROOT / script).read_text())
    assert len(SCRIPTS) == 10 and ast.get_docstring(tree)
    *head, main = [node for node in tree.body[1:] if not isinstance(node, ast.ImportFrom)]
    assert not head and isinstance(main, ast.If) and ast.unparse(main.test) == "__name__ == '__main__'"
    (call,) = main.body
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call) and not main.orelse
    modules = [module for module, _ in imports(tree)]
    assert modules and set(modules) <= {"utils.command", "utils.recipes"}


def test_jobs_named_by_scripts_are_there():
    """Entry points name their job by a string, since importing it takes seconds."""
    named = set()
    for source in (*(ROOT / script for script in SCRIPTS), FILES["utils.command"]):
        named |= set(re.findall(r'"(utils\.\w+):(\w+)"', source.read_text()))
    assert len(named) >= 5
    for module, function in named:
        assert floor(module) == list(FLOORS).index("jobs")
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in SOURCES[module].body)


def test_names_on_command_lines_are_those_of_the_registries():
    import models
    from utils import data, negatives, recipes, step

    assert tuple(models.ARCHS) == recipes.ARCHS
    assert recipes.STRATEGIES == negatives.STRATEGIES
    assert tuple(data.LOADERS) == recipes.DATASETS
    source = Path(step.__file__).read_text()
    objectives = {"pgd"} | set(re.findall(r'"(\w+)": (?:\w+\.)?\w+_loss\b', source))
    assert objectives == set(recipes.METHODS)
