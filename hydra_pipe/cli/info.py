"""Output of `info` for a person: one screen of 80 columns and 24 lines."""

import textwrap
from collections import Counter
from typing import Any

from hydra_pipe.cli.show import print_table
from hydra_pipe.errors import printable
from hydra_pipe.notebook.summary import rows_line, settings_line
from hydra_pipe.store.run.stages import RECORD
from hydra_pipe.units import format_bytes, format_seconds

# A screen has a line more, for the prompt.
_WIDTH, _LINES = 80, 23
# Most lines of one paragraph, most commands to print as next ones, and fewest stages.
_MOST_LINES, _MOST_COMMANDS, _FEWEST_STAGES = 3, 3, 4
_LONGEST_NAME = 30
_LONGEST_SECONDS, _NO_SECONDS = 1e12, 0.05
# Facts that a person asks for first. Others follow as far as the line has room.
_FIRST = ("last_epoch_loss", "test_accuracy", "n_proposed", "stalled_seconds", "n_tests")
# Facts that stand elsewhere, or say nothing to a person.
_LEFT_OUT = ("n_rows", "n_steps", "n_curved_rows", "train_seconds", "seconds", "checksums")


def show_info(info: dict[str, Any], *, blocks: bool) -> None:
    """Print the facts from `Run.info` for a person.

    The lines tell how much was recorded and how exactly, the progress of every stage, and the
    next commands. Text of a run is printed without anything that a terminal obeys, and cut where
    it is long: a stranger's run may have a name of any length. `--json` has all of it.

    Args:
        info: facts of the run.
        blocks: True to print the table of blocks too, whose lines are never cut: names of blocks
            differ at their ends.
    """
    head = _wrapped(f"{info['path']}  run {info['run_id']}")
    recording = info.get("recording")
    if recording is not None:
        head += _wrapped(rows_line(recording))
        head += _wrapped(f"encoding: {_encodings(recording['blocks'])}; --blocks shows each")
    total = sum(info["bytes"].values())
    parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in info["bytes"].items())
    head += _wrapped(f"on disk: {format_bytes(total)}: {parts}")
    settings = info["stages"].get(str(RECORD), {}).get("settings", {})
    head += _wrapped(f"settings: {settings_line(settings)}") if settings else []
    commands = [f"next: {printable(command)}" for command in info["next"][:_MOST_COMMANDS]]
    if len(info["next"]) > _MOST_COMMANDS:
        commands.append(f"and {len(info['next']) - _MOST_COMMANDS} more")
    print("\n".join(head))
    _print_stages(info["stages"], _LINES - len(head) - len(commands))
    if blocks and recording is not None:
        _print_blocks(recording["blocks"])
    for command in commands:
        print(command)


def _wrapped(text: str) -> list[str]:
    """Return a paragraph in at most three lines of 80 columns."""
    return textwrap.wrap(
        printable(text),
        _WIDTH,
        subsequent_indent="  ",
        max_lines=_MOST_LINES,
        placeholder=" ... (--json has all)",
        break_on_hyphens=False,
    )


def _print_stages(stages: dict[str, Any], n_lines: int) -> None:
    """Print a line for each stage: the recording, what is unfinished, and the latest others.

    Args:
        stages: stages by name, in their order.
        n_lines: lines that there are for all of it.
    """
    room = n_lines - 1 if len(stages) < n_lines else max(n_lines - 2, _FEWEST_STAGES)
    wanted = [name for name, s in stages.items() if name == str(RECORD) or s["state"] != "complete"]
    others = [name for name in stages if name not in wanted]
    chosen = {*wanted[:room], *others[::-1][: max(room - len(wanted), 0)]}
    shown = {name: stage for name, stage in stages.items() if name in chosen}
    rows = [
        [_cut(printable(name), _LONGEST_NAME), stage["state"], _took(stage["facts"])]
        for name, stage in shown.items()
    ]
    heads = ["stage", "state", "took", "found"]
    taken = sum(max(len(row[i]) for row in [heads, *rows]) + 2 for i in range(3))
    found = [_facts(stage["facts"], _WIDTH - taken) for stage in shown.values()]
    print_table(heads, [[*row, facts] for row, facts in zip(rows, found, strict=True)])
    if len(stages) > len(shown):
        print(f"and {len(stages) - len(shown)} more stages: --json")


def _took(facts: dict[str, Any]) -> str:
    seconds = facts.get("train_seconds", facts.get("seconds"))
    if not isinstance(seconds, int | float) or not abs(seconds) < _LONGEST_SECONDS:
        return ""
    return format_seconds(seconds)


def _facts(facts: dict[str, Any], width: int) -> str:
    """Return the facts of a stage that have room in one line, an error first."""
    if "error" in facts:
        return _cut(printable(str(facts["error"])), width)
    named = sorted(facts, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    line = ""
    for name in named:
        said = _fact(name, facts[name])
        longer = f"{line}, {said}" if line else said
        if said and len(longer) <= width:
            line = longer
    return line


def _fact(name: str, value: Any) -> str:
    """Return one fact in words. Empty if it says nothing to a person."""
    # Digests mean nothing to a person, and --json prints lists and objects in full.
    is_origin = name.endswith("sha256") or name.startswith("of_")
    if name in _LEFT_OUT or is_origin or value is None or isinstance(value, dict | list):
        return ""
    if name.endswith("seconds"):
        if not isinstance(value, int | float) or not _NO_SECONDS <= value < _LONGEST_SECONDS:
            return ""
        return f"{name.removesuffix('seconds').rstrip('_')} {format_seconds(value)}"
    if isinstance(value, float):
        return printable(f"{name} {value:.4g}")
    return printable(f"{name} {value:,}" if isinstance(value, int) else f"{name}: {value}")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 3, 0)]}..."


def _print_blocks(blocks: list[dict[str, Any]]) -> None:
    rows = [
        [
            printable(block["name"]),
            "x".join(map(str, block["shape"])),
            *(str(block[name]) for name in ("group", "encoding", "columns", "bytes_a_row")),
            "yes" if block["exact"] else "no: projected",
        ]
        for block in blocks
    ]
    print_table(["block", "shape", "group", "encoding", "columns", "bytes a row", "exact"], rows)


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
