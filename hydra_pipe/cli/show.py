"""Tables and lines that commands print for people."""

import math
from typing import Any

from hydra_pipe.errors import printable

# Widest column whose cells are filled up.
_WIDEST = 80
# Columns of a proposal and of its retrainings that the files have and the terminal does not show.
_UNSHOWN = ("reason", "given_class", "suggested_class", "decided")
_LESS = ("loss_over_random",)


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    """Print a table with a line of heads. Columns are as wide as their cells."""
    # A longer cell is shown whole, and the others are not padded to its width: a stranger's run
    # may have a name of any length.
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(heads, *rows, strict=True)]
    for cells in (heads, *rows):  # no fitting to the terminal: a program that reads this has none
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        )


def show_evaluation(rows: list[dict[str, Any]], says: list[str]) -> None:
    """Print the table of an evaluation, each interval as one column, and its lines for a person."""
    if rows:
        columns = [name for name in rows[0] if not name.endswith(("_low", "_high"))]
        print_table(columns, [[_cell(row, name) for name in columns] for row in rows])
    for text in says:
        print(printable(text))


def show_cleaning(
    first: list[dict[str, Any]],
    n_proposed: int,
    retraining: list[dict[str, Any]],
    summary: dict[str, Any],
) -> None:
    """Print the first proposed samples, the result of training without them, and lines on both.

    Args:
        first: first rows of `drop.parquet`.
        n_proposed: number of rows in `drop.parquet`.
        retraining: rows of `retraining.parquet`, empty if there is none.
        summary: summary of the proposal.
    """
    show_evaluation(
        [{name: value for name, value in row.items() if name not in _UNSHOWN} for row in first], []
    )
    if n_proposed > len(first):
        print(f"... and {n_proposed - len(first):,} more, each with its reason")
    for text in summary["says"]:
        print(printable(text))
    for part in ("hurts", "decisions"):
        for text in (summary.get(part) or {}).get("says", []):
            print(printable(text))
    if "retraining" in summary:
        show_evaluation(
            [{name: row[name] for name in row if not name.startswith(_LESS)} for row in retraining],
            summary["retraining"]["says"],
        )


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    if not isinstance(value, float):
        return printable(str(value))
    if math.isnan(value):
        return "unknown"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if isinstance(low, float) and isinstance(high, float) and math.isfinite(low):
        return f"{value:.3f} ({low:.3f} to {high:.3f})"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
