"""Facts of a run that its page tells as they are: losses, evaluations, what was recorded."""

import json
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.reporting.source import ReportSource
from hydra_pipe.store import names
from hydra_pipe.store.data.evaluations import read_says
from hydra_pipe.store.run.commands import PATHS
from hydra_pipe.store.run.results import MEAN
from hydra_pipe.store.run.stages import COMBINE, EVALUATE, RECORD, REDUCE
from hydra_pipe.units import format_bytes
from hydra_pipe.view import Run


def losses_of_columns(source: ReportSource) -> NDArray[np.float64]:
    """Return the loss of each column at the end, a mean for a group. Shape (column,)."""
    recorded = source.samples.test_losses().astype(np.float64)
    losses: NDArray[np.float64] = recorded[source.columns.test_ids]
    if not source.grouped:
        return losses
    if source.columns.by == MEAN:
        return np.array([losses.mean()])
    labels = source.samples.test_labels()
    if labels is None:
        return np.full(source.columns.n_columns, np.nan)
    own = labels[source.columns.test_ids]
    return np.array(
        [
            losses[own == name].mean() if (own == name).any() else np.nan
            for name in source.columns.names
        ]
    )


def mean_test_losses(source: ReportSource) -> list[tuple[int, float]]:
    """Return pairs of a step with test losses and their mean."""
    recording = source.recording
    if recording is None:
        return []
    gradients, last = recording.gradients, recording.counts.checkpoint
    # Without test gradients at the end, the group there has no losses.
    end = last + 1 if recording.counts.n_tests else last
    steps = [step for step in gradients.test_steps() if step < end]
    means = [
        (step, float(np.mean(gradients.test_losses(step), dtype=np.float64))) for step in steps
    ]
    return [(step, mean) for step, mean in means if np.isfinite(mean)]


def told(source: ReportSource) -> list[tuple[str, list[str]]]:
    """Return the lines of each evaluation of the run, by kind.

    An evaluation that cannot be read is left out, because `verify` reports it.
    """
    found = []
    for kind in source.directory.complete(EVALUATE):
        with suppress(OSError, ValueError):
            found.append((kind, read_says(source.directory.path / EVALUATE.of(kind).area)))
    return found


def recording_of(source: ReportSource) -> dict[str, Any] | None:
    """Return the facts of the recording that `info` tells. None of several runs."""
    if source.recording is None:
        return None
    info = Run(source.directory).info()
    recording: dict[str, Any] = info["recording"]
    return recording | {"bytes": format_bytes(info["bytes"].get(names.GRADIENTS, 0))}


def settings_of(source: ReportSource) -> list[tuple[str, str]]:
    """Return the settings of the stages and the versions, as pairs of a name and a value."""
    stages = source.directory.stages
    found: list[tuple[str, Any]] = []
    if source.combined is not None:
        paths = stages[COMBINE.of(source.result)].facts.get(PATHS)
        found.append(("combine: runs", paths if isinstance(paths, list) else None))
    else:
        found += [(f"record: {name}", value) for name, value in stages[RECORD].settings.items()]
    if source.relevance is not None:
        reduction = stages[REDUCE.of(source.result)]
        found += [(f"reduce: {name}", value) for name, value in reduction.settings.items()]
    found += [(f"version of {name}", value) for name, value in source.directory.versions.items()]
    return [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in found
        if value is not None
    ]
