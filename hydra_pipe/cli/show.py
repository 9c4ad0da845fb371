"""`info` for people."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_pipe.errors import printable
from hydra_pipe.notebook.summary import rows_line, settings_line
from hydra_pipe.units import format_bytes, format_seconds

_LONGEST_SECONDS = 1e12


def show_info(info: dict[str, Any]) -> None:
    """Print what `Run.info` found. What a run says is text, and no markup and nothing that a terminal obeys."""
    console = Console(highlight=False, markup=False)
    console.print(info["path"], style="bold", end="  ")
    console.print(f"run {printable(info['run_id'])}")

    stages = Table("stage", "state", "what it found", box=None, pad_edge=False)
    for name, stage in info["stages"].items():
        stages.add_row(name, stage["state"], _facts(stage["facts"]))
    console.print(stages)

    sizes = ", ".join(f"{name} {format_bytes(n)}" for name, n in info["bytes"].items())
    console.print(f"on disk: {sizes}")

    settings = info["stages"].get("record", {}).get("settings", {})
    console.print(f"settings: {settings_line(settings)}")

    recording = info.get("recording")
    if recording is None:
        return
    console.print(rows_line(recording))
    blocks = Table("block", "shape", "group", "encoding", "columns", "bytes a row", "exact", box=None, pad_edge=False)
    for block in recording["blocks"]:
        shape = "x".join(map(str, block["shape"]))
        cells = (block["group"], block["encoding"], block["columns"], block["bytes_a_row"])
        blocks.add_row(printable(block["name"]), shape, *map(str, cells), "yes" if block["exact"] else "no: projected")
    console.print(blocks)


def show_evaluation(rows: list[dict[str, Any]], says: list[str]) -> None:
    """Print the table of an evaluation, an interval as one column, and what there is to say of it."""
    if rows:
        columns = [name for name in rows[0] if not name.endswith(("_low", "_high"))]
        cells = [columns, *([_cell(row, name) for name in columns] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:  # not as wide as the terminal: a program that reads it has none
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for text in says:
        print(printable(text))


def show_cleaning(first: list[dict[str, Any]], n_proposed: int, retraining: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Print the first of what is proposed, what training without it came to, and what there is to say of both.

    Args:
        first: rows of `drop.parquet`.
        n_proposed: how many there are of them.
        retraining: rows of `retraining.parquet`, if there is one.
        summary: of the proposal.
    """
    show_evaluation([{name: value for name, value in row.items() if name != "reason"} for row in first], [])
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
        if isinstance(value, dict) or name.endswith("sha256"):
            continue
        if name.endswith("seconds") and isinstance(value, int | float) and abs(value) < _LONGEST_SECONDS:
            shown.append(f"{name.removesuffix('seconds').rstrip('_') or 'took'} {format_seconds(value)}")
        elif isinstance(value, float):
            shown.append(f"{name} {value:.4g}")
        elif value is not None:
            shown.append(f"{name} {value:,}" if isinstance(value, int) else f"{name}: {value}")
    return printable(", ".join(shown))
