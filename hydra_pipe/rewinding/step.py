"""One step of a training: its samples, their shares of it, and what it did to the tests."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hydra_pipe.errors import UsageError
from hydra_pipe.reduction.weights import checkpoint_of_steps, tracin_weights, used_weights
from hydra_pipe.rewinding.products import RowProducts
from hydra_pipe.rewinding.rows import (
    StepIndex,
    StepRows,
    class_column,
    joined_column,
    labels_column,
    samples_of,
)
from hydra_pipe.rewinding.spikes import Found, found_by_loss
from hydra_pipe.rewinding.words import caveats
from hydra_pipe.store import names
from hydra_pipe.store.data import rankings
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.predictions import read_predictions
from hydra_pipe.store.data.rankings import with_keys
from hydra_pipe.store.data.recording import SoFar
from hydra_pipe.types import F64, I64

# A squared norm of the step's gradient below this share of what its rows could make is rounding.
_CANCELLED = 1e-10


@dataclass(frozen=True)
class Rewind:
    """One step of a training, looked at again.

    Attributes:
        step: number of the step, from 0.
        samples: a row for each sample of the step, the largest share of the gradient first.
            Columns: `train_id`; `label`, the recorded label or else the class that the loss
            compared with; `predicted`, the class that the network predicted; `loss`; `loss_share`,
            of the sum over the step; `gradient_norm`, of the sample's part of the gradient that
            the step used; `gradient_share`, the part's projection onto the step's gradient over
            that gradient's length: shares add up to 1, and a negative one pulled back;
            `tests_change`, what the part alone changed in the mean loss of the tests; `spikes`,
            the number of spikes that the sample is in (`Run.spikes`); and `key` if samples have
            keys. A column is null where it is not known.
        tests: a row for each test sample, the most harmed first. Columns: `test_id`, `label`,
            `change` of its loss by this step, to first order, `loss` at the test gradients, and
            `key` if test samples have keys. None where no test gradients were taken.
        summary: facts of the step as plain values: `loss`, `expected_loss` and `score` as in
            `Run.spikes`, `learning_rates` of the parameter groups, `gradient_norm`,
            `gradient_scale` (clipping), `tests_step` and `tests_change`. Its `says` holds lines for
            a person.
    """

    step: int
    samples: pa.Table
    tests: pa.Table | None
    summary: dict[str, Any]


@dataclass(frozen=True)
class _Gradient:
    """The gradient of a step.

    Attributes:
        norm: its norm.
        norms: norm of each row's part of it, shape (row,).
        shares: share of each row, shape (row,); not a number where parts cancel.
    """

    norm: float
    norms: F64
    shares: F64


@dataclass(frozen=True)
class _Tests:
    """Change of the test losses by a step, to first order.

    Attributes:
        step: number of steps after which the test gradients were taken.
        change: change of each test loss, shape (test,).
        of_rows: change of the mean test loss by each row alone, shape (row,).
    """

    step: int
    change: F64
    of_rows: F64


def rewound(recording: SoFar, step: int) -> Rewind:
    """Return the result of `Run.rewind`.

    Raises:
        UsageError: there is no such step.
        StoreError: damaged.
    """
    store = recording.gradients
    if not 0 <= step < store.n_steps:
        raise UsageError(
            f"step {step}: steps 0 to {store.n_steps - 1:,} of {store.path} are recorded: give one "
            "of them"
        )
    rows = StepIndex(store).rows(step)
    ids = samples_of(store, rows, recording.n_samples)
    losses = joined_column(lambda own: store.row_dynamics(names.LOSS, own), rows)
    spikes = found_by_loss(recording)
    gradient, tests = None, None
    if not recording.pruned:
        held = StepRows(store, step, rows)
        gradient = _gradient(store, held)
        tests = _tests(recording, held, step)
    table = _table(recording, rows, ids, losses, gradient, tests, spikes)
    summary = _facts(store, step, gradient, tests, spikes) | {"n_rows": len(ids)}
    summary["says"] = caveats(recording, summary, losses)
    return Rewind(step, table, _tests_table(recording, tests), summary)


def _gradient(store: Gradients, held: StepRows) -> _Gradient:
    blocks, products = held.weighed(used_weights(store)), RowProducts(store.layout)
    norms = np.sqrt(products.squared_norms(blocks))
    along = products.with_sum(blocks)
    squared = float(along.sum())
    cancelled = squared <= _CANCELLED * float(norms.sum()) ** 2
    shares = np.full(len(along), np.nan) if cancelled else along / squared
    return _Gradient(float(np.sqrt(max(squared, 0.0))), norms, shares)


def _tests(recording: SoFar, held: StepRows, step: int) -> _Tests | None:
    """Return what the step did to the tests at the nearest test gradients, as `tracin` has it."""
    store = recording.gradients
    if not recording.tests:
        return None
    taken = np.array(recording.tests, np.int64)
    at = int(taken[checkpoint_of_steps(taken, np.array([step]))[0]])
    of_rows, of_tests = RowProducts(store.layout).with_tests(
        held.weighed(tracin_weights(store)), store.test_rows(at), store.preconditioner(at)
    )
    return _Tests(at, -of_tests, -of_rows / len(of_tests))


def _table(
    recording: SoFar,
    rows: list[slice],
    ids: I64,
    losses: NDArray[np.float32],
    gradient: _Gradient | None,
    tests: _Tests | None,
    spikes: Found | None,
) -> pa.Table:
    store, n = recording.gradients, len(ids)
    targets = joined_column(lambda own: store.row_dynamics(names.TARGET, own), rows)
    predicted = [found.classes for own in rows if (found := read_predictions(store, own))]
    classes = np.concatenate(predicted) if predicted else np.full(n, -1)
    total = float(np.nansum(losses, dtype=np.float64))
    shares = losses / total if total > 0 else np.full(n, np.nan)
    counts = None if spikes is None else spikes.counts()
    in_spikes = None if counts is None else [counts[int(sample)] for sample in ids]
    columns = {
        "train_id": pa.array(ids),
        "label": labels_column(recording, ids, targets),
        "predicted": class_column(classes),
        "loss": _known(losses.astype(np.float64)),
        "loss_share": _known(shares.astype(np.float64)),
        "gradient_norm": pa.nulls(n, pa.float64()) if gradient is None else _known(gradient.norms),
        "gradient_share": pa.nulls(n, pa.float64())
        if gradient is None
        else _known(gradient.shares),
        "tests_change": pa.nulls(n, pa.float64()) if tests is None else _known(tests.of_rows),
        "spikes": pa.nulls(n, pa.int32()) if in_spikes is None else pa.array(in_spikes, pa.int32()),
    }
    first = shares if gradient is None else gradient.shares
    table = with_keys(pa.table(columns), store.keys(names.TRAIN_KEYS), ids)
    return table.take(np.argsort(-np.nan_to_num(first), kind="stable"))


def _known(values: F64) -> pa.Array:
    return pa.array(values, pa.float64(), mask=~np.isfinite(values))


def _tests_table(recording: SoFar, tests: _Tests | None) -> pa.Table | None:
    if tests is None:
        return None
    store, order = recording.gradients, np.argsort(-tests.change, kind="stable")
    labels = store.labels(names.TEST_LABELS)
    labels = labels if labels is not None and len(labels) == len(order) else None
    kind = rankings.label_type(labels)
    table = pa.table(
        {
            "test_id": pa.array(order.astype(np.int64)),
            "label": rankings.label_column(labels, order, kind),
            "change": pa.array(tests.change[order]),
            "loss": _known(store.test_losses(tests.step)[order].astype(np.float64)),
        }
    )
    return with_keys(table, store.keys(names.TEST_KEYS), order)


def _facts(
    store: Gradients,
    step: int,
    gradient: _Gradient | None,
    tests: _Tests | None,
    spikes: Found | None,
) -> dict[str, Any]:
    standing = None if spikes is None else spikes.standing
    return {
        "run_id": store.run_id,
        "step": step,
        "n_steps": store.n_steps,
        "loss": _plain(store.step_table(names.LOSS)[step]),
        "expected_loss": None if standing is None else _plain(standing.expected[step]),
        "score": None if standing is None else _plain(standing.score[step]),
        "is_spike": None if standing is None else bool(standing.spikes[step]),
        "learning_rates": store.step_table("learning_rate")[step].tolist(),
        "gradient_norm": None if gradient is None else _plain(gradient.norm),
        "gradient_scale": _plain(store.step_table(names.GRADIENT_SCALE)[step]),
        "tests_step": None if tests is None else tests.step,
        "tests_change": None if tests is None else _plain(tests.change.mean()),
        "n_tests_harmed": None if tests is None else int((tests.change > 0).sum()),
    }


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
