"""Visits of all samples: the rows of a recording, put in order by sample and by visit."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.cleaning.classes import MOST_CLASSES
from hydra_pipe.errors import DataError, RunError
from hydra_pipe.labels.dynamics import Dynamics, TopLogits
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.types import I64
from hydra_pipe.units import format_bytes

# Meaning of few outputs of a sample.
_NO_CLASSES = {
    0: "a sample has several outputs, such as tokens or pixels, or none that is known (a loop "
    "must call the model itself, not its parts)",
    1: "a sample has one output: a regression, or one logit for two classes (train with two "
    "outputs instead)",
}
# Most visits of a sample that are looked at. Of more visits, as many are drawn evenly.
MOST_VISITS = 64
# Most bytes of the visits that are looked at, and fewest visits.
_MOST_BYTES, _FEWEST_VISITS = 4 * 2**30, 4
# Bytes of the numbers that are made of each visit (`labels/epochs.py`).
_NUMBERS = 4 * 8
# Rows that are read at once.
_ROWS_AT_ONCE = 2**18


def relabelled(dynamics: Dynamics, labels: I64) -> Dynamics:
    """Return the same visits, to be judged with other labels than the samples were trained with.

    Where only some logits are kept, the logit of another label is known if it is one of these.

    Args:
        dynamics: visits.
        labels: labels to judge, shape (sample,).
    """
    if not isinstance(dynamics.logits, TopLogits):
        return replace(dynamics, labels=labels)
    top = dynamics.logits
    at = top.classes == labels[:, None]
    kept = np.where(at.any(axis=2), (top.largest * at).sum(axis=2), np.nan).astype(top.own.dtype)
    own = np.where(labels == dynamics.labels, top.own, kept)
    return replace(dynamics, labels=labels, logits=replace(top, own=own))


def dynamics_of(gradients: Gradients) -> tuple[I64, Dynamics]:
    """Return the dynamics of the samples of a recording, visit by visit.

    The label of a sample is the class that the loss compared it with. Where the loss is not known
    to be a cross-entropy, the label is the recorded one.

    Args:
        gradients: the recording.

    Returns:
        Ids of the samples that were visited, ascending, and the dynamics of these samples.

    Raises:
        RunError: the recording has no logits.
        DataError: a sample has two labels, or labels are not numbers of classes.
        StoreError: damaged.
    """
    shape = gradients.dynamics_shape
    if shape.n_outputs < 2:
        raise RunError(
            f"{gradients.path}: {_NO_CLASSES[shape.n_outputs]}, so the dynamics cannot judge "
            "labels: reduce, and give --method hydra to judge by relevance"
        )
    if shape.n_outputs > MOST_CLASSES:
        raise RunError(
            f"{gradients.path} has {shape.n_outputs:,} classes, and labels of at most "
            f"{MOST_CLASSES:,} can be judged: reduce, and give --method hydra to judge by relevance"
        )
    rows = slice(0, gradients.rows.n_rows)
    ids, samples = np.unique(gradients.samples(rows), return_inverse=True)
    visit, n_visits = visits_of_rows(samples, gradients.step_of_rows(rows))
    labels = _labels(gradients, ids, samples, rows)
    chosen = _chosen_visits(gradients, n_visits, len(ids))
    place = np.full(n_visits, -1)
    place[chosen] = np.arange(len(chosen))
    placed = partial(_placed, gradients, place[visit], samples, (len(chosen), len(ids)))
    inputs = placed(names.LAST_INPUT) if shape.n_inputs else None
    logits = placed(names.LOGITS)
    if shape.keeps_all:
        return ids, Dynamics(labels, logits, inputs)
    top = TopLogits.of_columns(logits, placed(names.TOP_CLASSES), shape.n_outputs)
    return ids, Dynamics(labels, top, inputs)


def _chosen_visits(gradients: Gradients, n_visits: int, n_samples: int) -> I64:
    """Return the visits that are looked at, drawn evenly: as many as memory has room for.

    Raises:
        RunError: there is no room for a few visits of each sample.
    """
    columns = gradients.dynamics_shape.columns
    of_visit = n_samples * (_NUMBERS + sum(column.row_bytes for column in columns))
    room = _MOST_BYTES // of_visit
    if room < min(n_visits, _FEWEST_VISITS):
        raise RunError(
            f"{gradients.path}: {_FEWEST_VISITS} visits of {n_samples:,} samples take "
            f"{format_bytes(_FEWEST_VISITS * of_visit)}, at most {format_bytes(_MOST_BYTES)} are "
            "taken: reduce, and give --method hydra to judge by relevance"
        )
    count = min(n_visits, MOST_VISITS, room)
    found: I64 = np.unique(np.linspace(0, n_visits - 1, count).round().astype(np.int64))
    return found


def _placed(
    gradients: Gradients, place: I64, samples: I64, shape: tuple[int, int], name: str
) -> NDArray[Any]:
    """Return a column of the rows by visit and sample, shape (visit, sample, ...).

    Visits that did not happen are not a number, or -1.

    Args:
        gradients: the recording.
        place: place of each row's visit among those that are looked at, -1 for others.
        samples: place of each row's sample.
        shape: numbers of visits and of samples.
        name: name of the column.
    """
    found: NDArray[Any] | None = None
    for first in range(0, max(len(place), 1), _ROWS_AT_ONCE):
        rows = slice(first, min(first + _ROWS_AT_ONCE, len(place)))
        values = gradients.row_dynamics(name, rows)
        if found is None:
            empty = -1 if values.dtype.kind == "i" else np.nan
            found = np.full((*shape, *values.shape[1:]), empty, values.dtype)
        counted = place[rows] >= 0
        found[place[rows][counted], samples[rows][counted]] = values[counted]
    assert found is not None
    return found


def visits_of_rows(samples: I64, steps: I64) -> tuple[I64, int]:
    """Return the number of each row's visit to its sample, from 0, and the most visits.

    Args:
        samples: sample of each row, shape (row,).
        steps: step of each row, shape (row,).
    """
    order = np.lexsort((steps, samples))
    counts = np.bincount(samples)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    visit = np.empty(len(samples), np.int64)
    visit[order] = np.arange(len(samples)) - first
    return visit, int(counts.max(initial=0))


def _labels(gradients: Gradients, ids: I64, samples: I64, rows: slice) -> I64:
    targets = gradients.row_dynamics(names.TARGET, rows).astype(np.int64)
    known = targets >= 0
    labels: I64 = np.full(len(ids), -1, np.int64)
    labels[samples[known]] = targets[known]
    if (changed := np.flatnonzero(known & (labels[samples] != targets))).size:
        at = samples[changed[0]]
        raise DataError(
            f"sample {ids[at]} was trained with the label {targets[changed[0]]} and with "
            f"{labels[at]}: labels that change while training cannot be judged"
        )
    missing = labels < 0
    recorded = gradients.labels(names.TRAIN_LABELS) if missing.any() else None
    if recorded is not None and recorded.dtype.kind in "iu" and len(recorded) > ids[-1]:
        labels[missing] = recorded[ids[missing]]
    n_classes = gradients.dynamics_shape.n_outputs
    unknown = ids[(labels < 0) | (labels >= n_classes)]
    if len(unknown):
        raise DataError(
            f"the label of sample {unknown[0]} is not known as a number below {n_classes}: if "
            "each sample has one class, give sample_labels to the Recorder; if samples have "
            "several (multi-label) or targets are soft, dynamics cannot judge them: give --method "
            "hydra after hydra-pipe reduce"
        )
    return labels
