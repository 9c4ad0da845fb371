"""Columns of `samples.parquet` on what the network thought of each sample while it trained."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from hydra_pipe.labels.dynamics import Dynamics, TopLogits
from hydra_pipe.labels.epochs import Statistics, Visits, visits_of
from hydra_pipe.labels.totals import VisitTotals
from hydra_pipe.progress import Progress, Task
from hydra_pipe.store import names
from hydra_pipe.store.data.dynamics import MOST_OUTPUTS
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.types import I64, Bools, Floating

# Numbers of the logits that are read at once.
_BLOCK = 2**18


def totals_over(gradients: Gradients | None, samples: slice, progress: Progress) -> VisitTotals:
    """Add up the statistics of the visits of some samples. The rows are read block by block.

    The class of a row is the one that the loss compared with, or else the sample's integer label.
    Where the outputs of a sample are not classes, only the recorded losses count. Without a
    recording nothing is known of any visit.

    Raises:
        StoreError: the recording is damaged.
    """
    totals = VisitTotals(samples.stop - samples.start)
    if gradients is None:
        return totals
    n_rows = gradients.rows.n_rows
    recorded = gradients.labels(names.TRAIN_LABELS)
    labels = recorded if recorded is not None and recorded.dtype.kind in "iu" else None
    height = _BLOCK // max(1, min(gradients.dynamics_shape.n_outputs, MOST_OUTPUTS))
    with progress.task("dynamics", 2 * n_rows, "rows") as task:
        for rows, ids, own in _blocks(gradients, height, samples, task):
            visits = _visits(gradients, rows, own, ids, labels)
            totals.add(ids - samples.start, gradients.step_of_rows(rows)[own], visits)
        for rows, ids, own in _blocks(gradients, _BLOCK, samples, task):
            totals.add_order(ids - samples.start, gradients.step_of_rows(rows)[own])
    return totals


def _blocks(
    gradients: Gradients, height: int, samples: slice, task: Task
) -> Iterator[tuple[slice, I64, Bools]]:
    """Yield blocks of rows, with the samples of the rows that count and the mask of these rows."""
    for first in range(0, gradients.rows.n_rows, height):
        rows = slice(first, min(first + height, gradients.rows.n_rows))
        ids = gradients.samples(rows)
        own = (ids >= samples.start) & (ids < samples.stop)
        if own.any():
            yield rows, ids[own], own
        task.advance(len(ids))


def _visits(
    gradients: Gradients, rows: slice, own: Bools, samples: I64, labels: I64 | None
) -> Visits:
    """Return the numbers of some rows, shape (1, row). Not a number where they are not known.

    Args:
        gradients: the recording.
        rows: rows of a block.
        own: mask of the rows that count, shape (row of the block,).
        samples: samples of these rows, shape (row,).
        labels: integer labels of all samples, or None.
    """
    shape, n_rows = gradients.dynamics_shape, len(samples)
    if shape.n_outputs < 2:
        loss = gradients.row_dynamics(names.LOSS, rows)[own].astype(np.float64)[None]
        unknown = np.full((1, n_rows), np.nan)
        return Visits(loss, unknown, unknown, unknown)
    targets = gradients.row_dynamics(names.TARGET, rows)[own].astype(np.int64)
    if labels is not None:
        targets = np.where(targets >= 0, targets, labels[samples])
    known = (targets >= 0) & (targets < shape.n_outputs)
    found = Visits(*(np.full((1, n_rows), np.nan) for _ in range(4)))
    if not known.any():
        return found
    z: Floating = gradients.row_dynamics(names.LOGITS, rows)[own][known][None]
    if shape.keeps_all:
        seen = visits_of(Dynamics(targets[known], z))
    else:
        classes = gradients.row_dynamics(names.TOP_CLASSES, rows)[own][known].astype(np.int64)
        top = TopLogits.of_columns(z, classes[None], shape.n_outputs)
        seen = visits_of(Dynamics(targets[known], top))
    for name in ("loss", "margin", "error", "hit"):
        getattr(found, name)[0, known] = getattr(seen, name)[0]
    return found


def columns_of(statistics: Statistics) -> list[pa.Array]:
    """Return the columns of some samples, in the order of the schema."""
    floats = (
        statistics.mean_loss,
        statistics.last_loss,
        statistics.mean_margin,
        statistics.mean_error,
        statistics.variability,
    )
    wrong, first = statistics.wrong_epochs, statistics.first_learnt
    unknown = np.isnan(wrong)
    return [
        *(pa.array(values.astype(np.float32), from_pandas=True) for values in floats),
        pa.array(np.where(unknown, 0, wrong).astype(np.int32), mask=unknown),
        pa.array((first + 1).astype(np.int32), mask=first < 0),
    ]
