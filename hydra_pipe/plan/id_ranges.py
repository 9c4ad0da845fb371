"""Selections of samples, written "0-99,150": spans of ids, in order. Integers only."""

from collections.abc import Sequence

from hydra_pipe.errors import UsageError
from hydra_pipe.types import Span


def parse_selection(text: str, n: int, option: str = "--tests") -> tuple[Span, ...]:
    """Return the first and one past the last id of each span in `text`, in ascending order.

    Args:
        text: ids and spans FIRST-LAST with commas between them, in any order. A span includes both
            ends.
        n: number of samples.
        option: name of the option that gave `text`, "--tests" or "--samples".

    Raises:
        UsageError: `text` cannot be read, or names an id that does not exist.
    """
    spans: list[Span] = []
    what = "test samples" if option == "--tests" else "training samples"
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(
                f"{option} {text} is not a selection: write ids and spans of them, such as 0-99,150"
            )
        low, high = int(first), int(last) if dash else int(first)
        if high < low or high >= n:
            raise UsageError(
                f"{option} {text}: {part.strip()} is not within the {n} {what}, which are 0-{n - 1}"
            )
        spans.append((low, high + 1))
    joined: list[Span] = []
    for low, end in sorted(spans):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((low, end))
    return tuple(joined)


def write_selection(spans: Sequence[Span]) -> str:
    """Return `spans` as text for `parse_selection`. Each selection has one spelling."""
    return ",".join(
        str(first) if last == first + 1 else f"{first}-{last - 1}" for first, last in spans
    )


def size_of(spans: Sequence[Span]) -> int:
    """Return the number of ids in all spans."""
    return sum(last - first for first, last in spans)


def cut(spans: Sequence[Span], first: int, last: int) -> tuple[Span, ...]:
    """Return the ids at the places first to last - 1 of a selection."""
    found, start = [], 0
    for low, high in spans:
        a, b = max(first, start), min(last, start + high - low)
        if a < b:
            found.append((low + a - start, low + b - start))
        start += high - low
    return tuple(found)
