"""How docstrings begin: with a verb or with the noun that they are about."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hydra_pipe"
# Openings that hide the subject: a reader finds out in the middle of the sentence what it is about.
_WORDS = (
    "Of|That|Those|These|This|It|What|Whether|Where|As|From|How|Which|Who|When|By|In|With|Not|So"
)
OPENING = re.compile(rf"(?:{_WORDS})\b")
ARGUMENT = re.compile(r"\w[\w, ]*: (?:of|that|which|what|who|whether|where|as|from|how|see)\b")


def hidden_subjects(source: str) -> Iterator[str]:
    """The docstrings, and the lines of `Args:`, that do not begin with a verb or a noun."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node) or ""
        if OPENING.match(text):
            yield text.splitlines()[0]
        _, _, arguments = text.partition("\nArgs:\n")
        arguments = re.split(r"\n(?=\S)", arguments, maxsplit=1)[0]
        yield from (
            line.strip()
            for line in arguments.splitlines()
            if re.match(r" {4}\S", line) and ARGUMENT.match(line.strip())
        )


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_docstrings_begin_with_what_they_are_about(file: Path) -> None:
    assert list(hidden_subjects(file.read_text())) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Read the rows.", []),
        ("The rows of a step.", []),
        ("Of a step: its rows.", ["Of a step: its rows."]),
        ("Whether there are rows.", ["Whether there are rows."]),
        (
            "Read rows.\n\n    Args:\n        rows: rows to read.\n        n: of them.\n\n    "
            "Returns:\n        n: of what",
            ["n: of them."],
        ),
    ],
)
def test_hidden_subjects_are_found(text: str, found: list[str]) -> None:
    assert list(hidden_subjects(f'def f():\n    """{text}"""\n')) == found
