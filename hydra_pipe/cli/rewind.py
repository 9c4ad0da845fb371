"""The command `rewind`, and the tables that it prints."""

import json
import math
from typing import TYPE_CHECKING, Any

from hydra_pipe.cli.failures import explained
from hydra_pipe.cli.options import (
    Debug,
    FindSpikes,
    Json,
    Picture,
    RunPath,
    ShownSamples,
    SpikesBy,
    Step,
)
from hydra_pipe.cli.show import print_table
from hydra_pipe.errors import UsageError, printable
from hydra_pipe.progress import ConsoleProgress, Progress

if TYPE_CHECKING:
    from hydra_pipe.rewinding.spikes import Spikes
    from hydra_pipe.rewinding.step import Rewind

# Columns of the printed tables: name in the result, head, format.
_SAMPLES = {
    "train_id": ("sample", "d"),
    "key": ("key", "s"),
    "label": ("label", "s"),
    "predicted": ("predicted", "s"),
    "loss": ("loss", ".3g"),
    "loss_share": ("of loss", ".1%"),
    "gradient_norm": ("|grad|", ".3g"),
    "gradient_share": ("of grad", ".1%"),
    "tests_change": ("tests", "+.2g"),
    "spikes": ("spikes", "d"),
}
_TESTS = {
    "test_id": ("test", "d"),
    "key": ("key", "s"),
    "label": ("label", "s"),
    "change": ("change of loss", "+.3g"),
    "loss": ("loss", ".3g"),
}
# Tests that were harmed most, as many as samples at most.
_MOST_TESTS = 5


@explained
def rewind(
    run: RunPath,
    step: Step = None,
    spikes: FindSpikes = False,
    by: SpikesBy = None,
    top: ShownSamples = 12,
    json_: Json = False,
    picture: Picture = None,
    debug: Debug = False,
) -> None:
    """Show which samples were in a step, their share of its loss and gradient, and what the step
    did to the tests. --spikes finds steps to look at.

    Nothing is written but the picture. A recording that still runs answers for its committed steps.

    Example: hydra-pipe rewind runs/digits --spikes, then hydra-pipe rewind runs/digits --step 640
    """
    from hydra_pipe.view import open_run

    if spikes == (step is not None):
        raise UsageError("give --spikes, to find steps that stand out, or --step N, to look at one")
    if by is not None and not spikes:
        raise UsageError(f"--by {by} is for --spikes: add it, or leave out --by")
    if top < 1:
        raise UsageError(f"--top {top}: give 1 or more")
    if picture is not None:
        from hydra_pipe.rewinding.picture import picture_format

        picture_format(picture)  # before rows are read
    opened = open_run(run)
    progress = Progress() if json_ else ConsoleProgress()
    found = opened.spikes(by, progress=progress) if spikes or picture is not None else None
    if step is not None:
        one = opened.rewind(step)
        _show_step(one, top, as_json=json_)
    elif found is not None:
        _show_spikes(found, top, as_json=json_)
    if picture is not None and found is not None:
        from hydra_pipe.rewinding.picture import write_picture

        write_picture(picture, found, printable(run), step)
        if not json_:
            print(f"picture: {printable(picture)}")


def _show_step(one: "Rewind", top: int, *, as_json: bool) -> None:
    samples, tests = one.samples.to_pylist(), [] if one.tests is None else one.tests.to_pylist()
    if as_json:
        print(json.dumps(one.summary | {"samples": samples, "tests": tests}, indent=2))
        return
    rates = ", ".join(f"{rate:.4g}" for rate in one.summary["learning_rates"])
    print(
        f"step {one.step:,} of {one.summary['n_steps']:,}: {len(samples):,} samples, learning "
        f"rate {rates}"
    )
    print(printable(one.summary["says"][0]))
    _print_rows(samples, _SAMPLES, top)
    if tests:
        print("tests that the step harmed most:")
        _print_rows(tests[: min(top, _MOST_TESTS)], _TESTS, top)
    for line in one.summary["says"][1:]:
        print(printable(line))


def _show_spikes(found: "Spikes", top: int, *, as_json: bool) -> None:
    rows = found.table.to_pylist()
    if as_json:
        more = {"spikes": rows, "repeaters": found.repeaters.to_pylist()}
        print(json.dumps(found.summary | more, indent=2))
        return
    repeated = set(found.repeaters["train_id"].to_pylist())
    cells = [
        [
            str(row["first_step"])
            if row["first_step"] == row["last_step"]
            else f"{row['first_step']}-{row['last_step']}",
            f"{row['value']:.4g}",
            f"{row['expected']:.4g}",
            f"{row['score']:.1f}",
            str(len(row["samples"])),
            str(sum(sample in repeated for sample in row["samples"])),
        ]
        for row in sorted(rows, key=lambda row: -row["score"])
    ]
    if cells:
        heads = ["step", found.by, "expected", "score", "samples", "repeated"]
        print_table(heads, cells[:top])
    if len(cells) > top:
        print(f"... and {len(cells) - top:,} more")
    for line in found.summary["says"]:
        print(printable(line))
    if found.summary["next"] is not None:
        print(f"next: {printable(found.summary['next'])}")


def _print_rows(rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]], top: int) -> None:
    """Print the first rows. A column without any value is left out."""
    kept = [name for name in columns if any(row.get(name) is not None for row in rows)]
    cells = [[_cell(row[name], columns[name][1]) for name in kept] for row in rows[:top]]
    print_table([columns[name][0] for name in kept], cells)
    if len(rows) > top:
        print(f"... and {len(rows) - top:,} more")


def _cell(value: Any, form: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return printable(str(value)) if form == "s" else format(value, form)
