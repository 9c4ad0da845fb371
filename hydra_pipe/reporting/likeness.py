"""Common traits of two inputs, for a person: words of texts, columns of rows."""

import re
from collections import Counter
from collections.abc import Iterable

from hydra_pipe.reporting.drawing import Cells, Drawn, Text

# Texts of which a page must have so many before its common words are known.
_FEWEST_TEXTS = 10
# A word that more than this share of the texts have says nothing.
_COMMON = 0.2
WORD = re.compile(r"\w+")


def words_of(text: str) -> frozenset[str]:
    """Return the words of a text, in lower case."""
    return frozenset(WORD.findall(text.lower()))


def common_words(shown: Iterable[Drawn]) -> frozenset[str]:
    """Return the words that many of the texts have, such as "the"."""
    texts = [words_of(each.text) for each in shown if isinstance(each, Text)]
    if len(texts) < _FEWEST_TEXTS:
        return frozenset()
    counts = Counter(word for words in texts for word in words)
    return frozenset(word for word, n in counts.items() if n > _COMMON * len(texts))


def shared_words(one: Drawn | None, other: Drawn | None, common: frozenset[str]) -> frozenset[str]:
    """Return the words that two texts share, without the common ones."""
    if not isinstance(one, Text) or not isinstance(other, Text):
        return frozenset()
    return (words_of(one.text) & words_of(other.text)) - common


def differing_columns(one: Drawn | None, other: Drawn | None) -> list[tuple[str, str, str]] | None:
    """Return the columns in which two rows differ, with both values.

    None: they are no rows of the same columns, all of which are known.
    """
    if not isinstance(one, Cells) or not isinstance(other, Cells):
        return None
    names, others = ([name for name, _ in row.cells] for row in (one, other))
    if names != others or one.n_cells != len(names) or other.n_cells != len(names):
        return None
    return [
        (name, mine, its)
        for (name, mine), (_, its) in zip(one.cells, other.cells, strict=True)
        if mine != its
    ]
