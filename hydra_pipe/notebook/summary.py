"""Summary of a run in a few lines of HTML.

All styles are inline, because notebooks keep only these. No colour needs a light page.
"""

from html import escape
from typing import Any

from hydra_pipe.errors import HydraError, printable
from hydra_pipe.store.files import tree_bytes
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DEFAULT_METHOD, ResultName
from hydra_pipe.store.run.stages import EXPORT, RECORD, REDUCE, TOPS, Stage, StageId
from hydra_pipe.units import format_bytes, format_seconds

_MOST_COMMANDS, _LONGEST_SECONDS = 3, 1e12
# Colours that are readable on white and on black.
_STATES = {"complete": ("✓", "#2e9d5b"), "running": ("…", "#c98a12"), "failed": ("✗", "#d9483b")}
# Rules of the page and of browsers for tables would bring in colours of a light page.
_INHERITED = "color:inherit;font-size:inherit"
_CELL = f"text-align:left;padding:1px 14px 1px 0;background:transparent;border:0;{_INHERITED}"
_DIM = "opacity:0.65"


def rows_line(recording: dict[str, Any]) -> str:
    """Describe the recorded rows, from `Run.info()["recording"]`."""
    ranks = f", recorded by {recording['ranks']} processes" if recording["ranks"] > 1 else ""
    return (
        f"{recording['rows']:,} rows of {recording['features']:,} columns ({recording['dtype']}) "
        "for "
        f"{recording['parameters']:,} parameters, {recording['steps']:,} steps{ranks}"
    )


def settings_line(settings: dict[str, Any]) -> str:
    """Return the settings of a recording that are single values."""
    return printable(
        ", ".join(
            f"{key}={value}"
            for key, value in settings.items()
            if not isinstance(value, dict | None)
        )
    )


def next_commands(run: RunDirectory) -> list[str]:
    """Return the commands to run next.

    These are the unfinished stages, else a first reduction, else exports of reduced results.
    """
    stages = run.stages
    if RECORD not in stages and not run.is_combined:
        return [run.command(RECORD)]
    unfinished = [which for which, stage in stages.items() if stage.state != "complete"]
    if unfinished:
        return [run.command(which) for which in unfinished]
    reduced = [
        method for method in run.of_kind(REDUCE) if not ResultName.parse(method).is_of_itself
    ]
    ranked = [*reduced, *run.of_kind(TOPS)]
    if not ranked:
        return [run.command(REDUCE.of(DEFAULT_METHOD))]
    return [run.command(EXPORT.of(method)) for method in ranked if EXPORT.of(method) not in stages]


def plain(run: RunDirectory, methods: list[str]) -> str:
    """Return one line with the path of a run and its progress."""
    stage = run.stages.get(RECORD)
    state = "nothing recorded" if stage is None else f"recording {stage.state}"
    if run.is_combined:
        state = "combines runs"
    done = f"relevance of {', '.join(methods)}" if methods else "no relevance yet"
    return printable(f"Run({str(run.path)!r}: {state}, {done})")


def html(run: RunDirectory, recording: dict[str, Any] | None) -> str:
    """Return the summary, with every word of the run escaped."""
    lines = [
        f"<div><b>{_text(str(run.path))}</b> <span style='{_DIM}'>run "
        f"{_text(run.run_id)}</span></div>"
    ]
    if recording is not None:
        lines.append(
            f"<div>{_counted(run)}{_text(rows_line(recording))}{_exactness(recording)}</div>"
        )
    if run.stages:
        rows = "".join(_row(run, which, stage) for which, stage in run.stages.items())
        heads = "".join(
            f"<th style='{_CELL};font-weight:normal;{_DIM}'>{head}</th>"
            for head in ("stage", "state", "size", "took")
        )
        lines.append(
            "<table style='border-collapse:collapse;margin:6px "
            f"0;{_INHERITED}'><tr>{heads}</tr>{rows}</table>"
        )
    if RECORD in run.stages:
        lines.append(
            f"<div style='{_DIM}'>{_text(settings_line(run.stages[RECORD].settings))}</div>"
        )
    commands = next_commands(run)
    lines += [
        f"<div>next: <code>{_text(command)}</code></div>" for command in commands[:_MOST_COMMANDS]
    ]
    if len(commands) > _MOST_COMMANDS:
        lines.append(f"<div>and {len(commands) - _MOST_COMMANDS} more</div>")
    return _boxed(lines)


def html_of_failure(run: RunDirectory, error: HydraError) -> str:
    """Return a replacement for the summary of a run that cannot be read."""
    return _boxed([f"<div><b>{_text(str(run.path))}</b></div>", f"<div>{_text(str(error))}</div>"])


def _boxed(lines: list[str]) -> str:
    return (
        "<div style='border-left:3px solid #8888;padding:2px 0 2px "
        f"10px;line-height:1.5'>{''.join(lines)}</div>"
    )


def _counted(run: RunDirectory) -> str:
    stage = run.stages[RECORD]
    if stage.state != "complete":
        return ""
    return (
        f"{stage.count('n_samples'):,} training samples, {stage.count('n_tests'):,} test "
        "samples<br>"
    )


def _exactness(recording: dict[str, Any]) -> str:
    blocks = recording["blocks"]
    projected = sum(not block["exact"] for block in blocks)
    return (
        f", {projected} of {len(blocks)} blocks projected" if projected else ", without projection"
    )


def _row(run: RunDirectory, which: StageId, stage: Stage) -> str:
    mark, colour = _STATES[stage.state]
    state = f"<span style='color:{colour}'>{mark}</span> {stage.state}"
    if (why := stage.facts.get("error")) is not None:
        state += f": {_text(str(why))}"
    seconds = stage.facts.get("train_seconds" if which == RECORD else "seconds")
    took = (
        format_seconds(seconds)
        if isinstance(seconds, int | float) and abs(seconds) < _LONGEST_SECONDS
        else ""
    )
    n_bytes = tree_bytes(run.path / which.area)
    cells = (_text(str(which)), state, format_bytes(n_bytes) if n_bytes else "", took)
    shown = "".join(f"<td style='{_CELL}'>{cell}</td>" for cell in cells)
    return f"<tr style='background:transparent'>{shown}</tr>"


def _text(text: str) -> str:
    return escape(printable(text))
