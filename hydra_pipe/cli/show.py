"""Tables and lines that commands print for people."""

import math
from collections import Counter
from typing import Any

from hydra_pipe.errors import printable
from hydra_pipe.notebook.summary import rows_line, settings_line
from hydra_pipe.store.run.stages import CHECKSUMS
from hydra_pipe.units import format_bytes, format_seconds

_LONGEST_SECONDS = 1e12
# Widest column whose cells are filled up.
_WIDEST = 80
# Most commands to print as next ones.
_MOST_COMMANDS = 3


def show_info(info: dict[str, Any]) -> None:
    """Print the facts from `Run.info` for a person.

    The lines tell how much was recorded and how exactly, the progress of every stage, and the
    next commands. Text of a run is printed without anything that a terminal obeys. No line is
    cut or fitted to the terminal's width, because the names of blocks differ at their ends.
    """
    print(printable(f"{info['path']}  run {info['run_id']}"))
    recording = info.get("recording")
    if recording is not None:
        print(rows_line(recording))
        print(f"encoding: {_encodings(recording['blocks'])}")
    total = sum(info["bytes"].values())
    print(
        f"on disk: {format_bytes(total)}: "
        f"{', '.join(f'{name} {format_bytes(n)}' for name, n in info['bytes'].items())}"
    )
    settings = info["stages"].get("record", {}).get("settings", {})
    print(f"settings: {settings_line(settings)}")
    print_table(
        ["stage", "state", "what it found"],
        [
            [printable(name), stage["state"], _facts(stage["facts"])]
            for name, stage in info["stages"].items()
        ],
    )
    if recording is not None:
        rows = []
        for block in recording["blocks"]:
            cells = (block["group"], block["encoding"], block["columns"], block["bytes_a_row"])
            shape = "x".join(map(str, block["shape"]))
            rows.append(
                [
                    printable(block["name"]),
                    shape,
                    *map(str, cells),
                    "yes" if block["exact"] else "no: projected",
                ]
            )
        print_table(
            ["block", "shape", "group", "encoding", "columns", "bytes a row", "exact"], rows
        )
    for command in info["next"][:_MOST_COMMANDS]:
        print(f"next: {printable(command)}")
    if len(info["next"]) > _MOST_COMMANDS:
        print(f"and {len(info['next']) - _MOST_COMMANDS} more")


def _encodings(blocks: list[dict[str, Any]]) -> str:
    """Count the blocks of each encoding, and tell whether the encodings lose anything."""
    counts = Counter(block["encoding"] for block in blocks)
    projected = sum(not block["exact"] for block in blocks)
    exact = (
        f"{projected} of {len(blocks)} blocks projected"
        if projected
        else "lossless except for the dtype"
    )
    return f"{', '.join(f'{n:,} {name}' for name, n in counts.items())}; {exact}"


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
        [{name: value for name, value in row.items() if name != "reason"} for row in first], []
    )
    if n_proposed > len(first):
        print(f"... and {n_proposed - len(first):,} more, each with its reason")
    for text in summary["says"]:
        print(printable(text))
    if "retraining" in summary:
        show_evaluation(retraining, summary["retraining"]["says"])


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


def _facts(facts: dict[str, Any]) -> str:
    shown = []
    for name, value in facts.items():
        # Digests mean nothing to a person, and --json prints lists and objects in full.
        if (
            isinstance(value, dict | list)
            or name.endswith("sha256")
            or name == CHECKSUMS
            or name.startswith("of_")
        ):
            continue
        if (
            name.endswith("seconds")
            and isinstance(value, int | float)
            and abs(value) < _LONGEST_SECONDS
        ):
            shown.append(
                f"{name.removesuffix('seconds').rstrip('_') or 'took'} {format_seconds(value)}"
            )
        elif isinstance(value, float):
            shown.append(f"{name} {value:.4g}")
        elif value is not None:
            shown.append(f"{name} {value:,}" if isinstance(value, int) else f"{name}: {value}")
    return printable(", ".join(shown))
