"""How the tests are run: each file by one process, by its name."""

from collections import Counter
from pathlib import Path

from support.slow import SLOW

FILES = Counter(file.stem for file in Path(__file__).parent.rglob("test_*.py"))


def test_files_of_tests_have_names_of_their_own() -> None:
    """Two of one name cannot be collected together."""
    assert [name for name, n in FILES.items() if n > 1] == []


def test_every_slow_file_is_there() -> None:
    assert [name for name in SLOW if name not in FILES] == []
    assert len(set(SLOW)) == len(SLOW)
