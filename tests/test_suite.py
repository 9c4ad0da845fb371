"""How the tests are run: each file by one process, by its name."""

import re
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


def test_no_test_is_a_library_of_another() -> None:
    """What several tests need is in a file that is no test, or in tests/support."""
    importing = re.compile(r"^\s*(from|import) (\w+\.)*test_\w+", re.MULTILINE)
    files = Path(__file__).parent.rglob("*.py")
    assert [file.name for file in files if importing.search(file.read_text())] == []
