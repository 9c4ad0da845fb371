"""Imports point down only (docs/architecture.md, "Floors") and go round in no circle, deferred ones
included.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hydra_pipe"
# Lowest first. Modules on one floor may import each other, except where they are set apart below.
FLOORS = [
    {"errors", "types", "units", "progress", "streams"},
    {"maths"},
    {"per_sample"},
    {"plan", "labels"},
    {"store"},
    {"recording", "reduction", "exporting", "combining"},
    {"training"},
    {"loading", "notebook", "integrations", "rewinding"},
    {"view"},
    {"replay", "probing"},
    {"retraining"},
    {"evaluation"},
    {"cleaning"},
    {"reporting"},
    {"api"},
    {"cli"},
    {"__main__"},
]
APART = {"recording", "reduction", "exporting", "combining"}
# Rooms of the store, lowest first; modules outside of them are the ground.
ROOMS = ["zarr", "run", "data", "integrity"]
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
            modules |= (
                {f"{module}.{alias.name}" for alias in node.names}
                if module == "hydra_pipe"
                else {module}
            )
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            modules |= {
                a.value
                for a in node.args
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            }
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


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE))
)
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
        (
            "store",
            "def f():\n    from hydra_pipe.recording import recorder",
            "store imports recording, which is above it",
        ),
        (
            "reduction",
            "from hydra_pipe.exporting import run",
            "reduction imports exporting: these meet in store only",
        ),
        ("plan", "from hydra_pipe import Recorder", "plan imports Recorder, which is on no floor"),
        (
            "plan",
            "import importlib\nimportlib.import_module('hydra_pipe.cli.app')",
            "plan imports cli, which is above it",
        ),
    ],
)
def test_an_import_that_points_up_is_named(unit: str, source: str, expected: str) -> None:
    assert violations(unit, source) == [expected]


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING`, which are never executed."""
    yield tree
    is_typing = isinstance(tree, ast.If) and getattr(tree.test, "id", "") == "TYPE_CHECKING"
    for child in tree.orelse if is_typing else ast.iter_child_nodes(tree):
        yield from at_run_time(child)


def modules_imported(source: str, modules: set[str]) -> set[str]:
    """The members of `modules` that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules or {node.module or ""}
    return found & modules


def circles(sources: Mapping[str, str]) -> set[tuple[str, ...]]:
    """Sorted names of the modules of each circle; circles that share a module are one.

    Args:
        sources: text of each module, by name.
    """
    imports = {
        name: modules_imported(source, set(sources)) - {name} for name, source in sources.items()
    }

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            new = imports[ahead.pop()] - found
            found |= new
            ahead += new
        return found

    ways = {name: reached(name) for name in sources}
    return {
        tuple(sorted(other for other in ways[name] if name in ways[other]))
        for name in sources
        if name in ways[name]
    }


def room(parts: Sequence[str]) -> int:
    """Height of a module of the store, from the parts of its name below `hydra_pipe.store`."""
    return ROOMS.index(parts[0]) + 1 if parts and parts[0] in ROOMS else 0


@pytest.mark.parametrize(
    "file",
    sorted((PACKAGE / "store").rglob("*.py")),
    ids=lambda file: str(file.relative_to(PACKAGE / "store")),
)
def test_imports_within_the_store_point_down(file: Path) -> None:
    own = room(file.relative_to(PACKAGE / "store").parts)
    stores = {
        ".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts)
        for f in (PACKAGE / "store").rglob("*.py")
    }
    imported = modules_imported(file.read_text(), stores)
    assert not [name for name in sorted(imported) if room(name.split(".")[2:]) > own]
    assert file.parent == PACKAGE / "store" or own, "a room of the store that ROOMS does not have"


def test_imports_go_round_in_no_circle() -> None:
    files = {
        file: ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in PACKAGE.rglob("*.py")
    }
    sources = {name.removesuffix(".__init__"): file.read_text() for file, name in files.items()}
    del sources["hydra_pipe"]  # the facade: each name is loaded on first use
    assert not circles(sources)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"a": "import b", "b": "def f():\n    from a import g"}, {("a", "b")}),
        (
            {"p": "", "p.a": "from p import b", "p.b": "import p.c", "p.c": "from p.a import x"},
            {("p.a", "p.b", "p.c")},
        ),
        ({"a": "import b", "b": "if TYPE_CHECKING:\n    import a"}, set()),
        (
            {
                "a": "import b",
                "b": "if TYPE_CHECKING:\n    import c\nelse:\n    import a",
                "c": "import a",
            },
            {("a", "b")},
        ),
        ({"a": "import b, c", "b": "import c", "c": ""}, set()),
    ],
)
def test_a_circle_of_imports_is_named(
    sources: dict[str, str], expected: set[tuple[str, ...]]
) -> None:
    assert circles(sources) == expected


def test_reduction_export_and_command_line_need_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import hydra_pipe.reduction.run, hydra_pipe.exporting.run, hydra_pipe.cleaning.run, "
        "hydra_pipe.reporting.run, hydra_pipe.labels\n"
        "import hydra_pipe.view, hydra_pipe.cli.app"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
