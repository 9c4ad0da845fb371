"""Each text that commands print is the one that is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from texts import TEXTS

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All texts, made in an own process: plans count the memory that a process has taken."""
    directory = tmp_path_factory.mktemp("golden")
    subprocess.run(
        [sys.executable, HERE / "texts.py", directory],
        check=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
    )
    return directory


@pytest.mark.parametrize("name", TEXTS)
def test_commands_print_what_is_kept(printed: Path, name: str) -> None:
    """Changed on purpose: `python tests/golden/texts.py tests/golden`, and read the difference."""
    assert (printed / name).read_text() == (HERE / name).read_text()
