"""Imports point down only (docs/architecture.md, "Floors"), deferred ones included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hydra_pipe"
# Lowest first. Modules on one floor may import each other, except where they are set apart below.
FLOORS = [
    {"errors", "units", "progress", "streams"},
    {"maths"},
    {"plan"},
    {"store"},
    {"recording", "reduction", "exporting"},
    {"loading", "notebook", "integrations"},
    {"view"},
    {"replay", "probing", "reporting"},
    {"retraining"},
    {"evaluation"},
    {"cleaning"},
    {"api"},
    {"cli"},
    {"__main__"},
]
APART = {"recording", "reduction", "exporting"}
RANK = {name: rank for rank, floor in enumerate(FLOORS) for name in floor}


def imported_units(tree: ast.AST) -> set[str]:
    """Parts of hydra_pipe that a module imports, anywhere in it; "" is the package itself."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test sees where they point"
            module = node.module or ""
            modules |= {f"{module}.{alias.name}" for alias in node.names} if module == "hydra_pipe" else {module}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            modules |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {[*m.split("."), ""][1] for m in modules if m.split(".")[0] == "hydra_pipe"}


def violations(unit: str, source: str) -> list[str]:
    found = []
    for target in sorted(imported_units(ast.parse(source))):
        if target not in RANK:
            found.append(f"{unit} imports {target or 'the package itself'}, which is on no floor")
        elif RANK[target] > RANK[unit]:
            found.append(f"{unit} imports {target}, which is above it")
        elif target != unit and {unit, target} <= APART:
            found.append(f"{unit} imports {target}: these meet in store only")
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    unit = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if unit == "__init__":
        return  # the facade: names of every floor, each loaded on first use
    assert unit in RANK, f"{unit} has no floor: give it one in FLOORS and in docs/architecture.md"
    assert violations(unit, file.read_text()) == []


@pytest.mark.parametrize(
    ("unit", "source", "expected"),
    [
        ("maths", "import hydra_pipe.store.names", "maths imports store, which is above it"),
        ("store", "def f():\n    from hydra_pipe.recording import recorder", "store imports recording, which is above it"),
        ("reduction", "from hydra_pipe.exporting import run", "reduction imports exporting: these meet in store only"),
        ("plan", "from hydra_pipe import Recorder", "plan imports Recorder, which is on no floor"),
        ("plan", "import importlib\nimportlib.import_module('hydra_pipe.cli.app')", "plan imports cli, which is above it"),
    ],
)
def test_an_import_that_points_up_is_named(unit: str, source: str, expected: str) -> None:
    assert violations(unit, source) == [expected]


def test_reduction_export_and_command_line_need_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import hydra_pipe.reduction.run, hydra_pipe.exporting.run, hydra_pipe.cleaning.run, hydra_pipe.reporting.run\n"
        "import hydra_pipe.view, hydra_pipe.cli.app"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
