"""One recorded and reduced run with wrong labels, which each test may copy."""

import shutil
from pathlib import Path

import pytest
from support import ROOT

import hydra_pipe

FILE = f"""
import sys
sys.path[:0] = {[str(ROOT / "tests")]!r}
from hydra_pipe import Pipeline
from support.mislabelled import small

def pipeline(seed: int = 0) -> Pipeline:
    return small(seed)
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a pipeline file: 60 samples of 4 classes, 12 of them wrong, 24 tests."""
    directory = tmp_path_factory.mktemp("clean")
    (directory / "file.py").write_text(FILE)
    hydra_pipe.record(str(directory / "file.py"), directory / "run")
    hydra_pipe.reduce(directory / "run", method="hydra")
    return directory / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))
