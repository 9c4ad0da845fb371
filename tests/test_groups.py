"""The table of slow groups names groups that there are."""

import re
from pathlib import Path

import pytest
from support.groups import SLOW

TESTS = Path(__file__).parent


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_group_is_a_file_or_a_mark(name: str) -> None:
    files = {file.stem: file.read_text() for file in TESTS.rglob("test_*.py")}
    marks = {mark for text in files.values() for mark in re.findall(r'xdist_group\("([^"]+)"\)', text)}
    assert (name in files) != (name in marks)


def test_no_group_is_named_twice() -> None:
    assert len(set(SLOW)) == len(SLOW)
