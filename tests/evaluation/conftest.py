"""A run of the smooth training, which the kinds of evaluation are tried on."""

import shutil
from pathlib import Path

import pytest
from support import ROOT

import hydra_pipe

FILE = """
import sys
sys.path[:0] = {tests!r}
from support.smooth import net

def pipeline(lr: float = 0.1, seed: int = 0):
    return net(lr, seed)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A pipeline file, and its run, reduced by two methods."""
    directory = tmp_path_factory.mktemp("evaluate")
    (directory / "file.py").write_text(FILE.format(tests=[str(ROOT / "tests")]))
    run = directory / "run"
    hydra_pipe.record(str(directory / "file.py"), run)
    for method in ("hydra", "hydra-fisher"):
        hydra_pipe.reduce(run, method=method)
    return str(directory / "file.py"), run


@pytest.fixture
def case(made: tuple[str, Path], tmp_path: Path) -> tuple[str, Path]:
    """A pipeline file, and a copy of its run."""
    return made[0], shutil.copytree(made[1], tmp_path / "run")
