"""Columns of `samples.parquet` on what the network thought of each sample while it trained."""

import numpy as np
import pyarrow as pa

from hydra_pipe.labels.dynamics import Dynamics, TopLogits
from hydra_pipe.labels.epochs import Statistics, Visits, visits_of
from hydra_pipe.labels.totals import VisitTotals
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data.dynamics import MOST_OUTPUTS
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.types import I64

# Numbers of the logits that are read at once.
_BLOCK = 2**20


def statistics_over(gradients: Gradients, n_samples: int, progress: Progress) -> Statistics:
    """Return the statistics of each sample's visits, read block by block.

    The class of a row is the one that the loss compared with, or else the sample's integer label.
    Where the outputs of a sample are not classes, only the recorded losses count.

    Raises:
        StoreError: the recording is damaged.
    """
    totals, n_rows = VisitTotals(n_samples), gradients.rows.n_rows
    recorded = gradients.labels(names.TRAIN_LABELS)
    labels = recorded if recorded is not None and recorded.dtype.kind in "iu" else None
    height = _BLOCK // max(1, min(gradients.dynamics_shape.n_outputs, MOST_OUTPUTS))
    with progress.task("dynamics", 2 * n_rows, "rows") as task:
        for first in range(0, n_rows, height):
            rows = slice(first, min(first + height, n_rows))
            samples = gradients.samples(rows)
            visits = _visits(gradients, rows, samples, labels)
            totals.add(samples, gradients.step_of_rows(rows), visits)
            task.advance(len(samples))
        for first in range(0, n_rows, _BLOCK):
            rows = slice(first, min(first + _BLOCK, n_rows))
            samples = gradients.samples(rows)
            totals.add_order(samples, gradients.step_of_rows(rows))
            task.advance(len(samples))
    return totals.statistics()


def _visits(gradients: Gradients, rows: slice, samples: I64, labels: I64 | None) -> Visits:
    """Return the numbers of some rows, shape (1, row). Not a number where they are not known."""
    shape, n_rows = gradients.dynamics_shape, len(samples)
    if shape.n_outputs < 2:
        loss = gradients.row_dynamics(names.LOSS, rows).astype(np.float64)[None]
        unknown = np.full((1, n_rows), np.nan)
        return Visits(loss, unknown, unknown, unknown)
    targets = gradients.row_dynamics(names.TARGET, rows).astype(np.int64)
    if labels is not None:
        targets = np.where(targets >= 0, targets, labels[samples])
    known = (targets >= 0) & (targets < shape.n_outputs)
    logits = gradients.row_dynamics(names.LOGITS, rows)[known]
    found = Visits(*(np.full((1, n_rows), np.nan) for _ in range(4)))
    if not known.any():
        return found
    if shape.keeps_all:
        own = visits_of(Dynamics(targets[known], logits[None]))
    else:
        classes = gradients.row_dynamics(names.TOP_CLASSES, rows)[known].astype(np.int64)
        top = TopLogits(
            logits[None, :, 0],
            logits[None, :, 2:],
            classes[None],
            logits[None, :, 1],
            shape.n_outputs,
        )
        own = visits_of(Dynamics(targets[known], top))
    for name in ("loss", "margin", "error", "hit"):
        getattr(found, name)[0, known] = getattr(own, name)[0]
    return found


def columns_of(statistics: Statistics, rows: slice) -> list[pa.Array]:
    """Return the columns of some samples, in the order of the schema."""
    floats = (
        statistics.mean_loss,
        statistics.last_loss,
        statistics.mean_margin,
        statistics.mean_error,
        statistics.variability,
    )
    found = [pa.array(values[rows].astype(np.float32), from_pandas=True) for values in floats]
    wrong, first = statistics.wrong_epochs[rows], statistics.first_learnt[rows]
    unknown = np.isnan(wrong)
    return [
        *found,
        pa.array(np.where(unknown, 0, wrong).astype(np.int32), mask=unknown),
        pa.array((first + 1).astype(np.int32), mask=first < 0),
    ]
