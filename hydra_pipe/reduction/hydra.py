"""Method `hydra`: the Hessian-free relevance as a weighted sum over stored rows.

R(i, j) = - sum_t alpha(t) c(t) <r(i, t), h_j> (docs/architecture.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from dask.delayed import Delayed, delayed
from numpy.typing import NDArray

from hydra_pipe.maths.relevance import add_by_sample
from hydra_pipe.maths.schedule import step_weights
from hydra_pipe.plan.reduction import ReductionPlan
from hydra_pipe.reduction.scores import TestBlock, decode_tests, score_rows
from hydra_pipe.reduction.segments import segments_of
from hydra_pipe.store import names
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.relevance import open_relevance, write_relevance

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """What every task of a reduction needs to find its input; small, and the same for all of them.

    Args:
        gradients: path of the store.
        checkpoint: step of the test gradients.
        n_samples: training samples.
    """

    gradients: Path
    checkpoint: int
    n_samples: int


def relevance_graph(
    source: Source,
    plan: ReductionPlan,
    tests: tuple[int, int],
    weights: "StepWeights",
    relevance: Path,
    method: str,
    count_rows: Callable[[int], None],
) -> Delayed:
    """One pass: the columns `tests` of the relevance array, computed and written. Building it reads nothing.

    Args:
        source: what is reduced.
        plan: how.
        tests: first and one past the last test sample.
        weights: of the rows of every step.
        relevance: path of the store that is written to.
        method: array in it.
        count_rows: called with the number of rows that have been done.
    """
    shared_weights = delayed(weights, pure=False)
    test_block = delayed(_load_tests)(source, tests)
    add_up = delayed(_partial_relevance)
    partials = [add_up(source, plan, run, test_block, shared_weights, count_rows) for run in plan.row_runs]
    result: Delayed = delayed(_write)(relevance, method, tests, partials)
    return result


@dataclass(frozen=True)
class StepWeights:
    """- alpha(t) c(t), once for each distinct history.

    Args:
        values: shape (step, series), float64.
        series: of each block, shape (block,).
    """

    values: NDArray[np.float64]
    series: NDArray[np.int64]

    def of_rows(self, steps: NDArray[np.int64], scale: Floats) -> Floats:
        """Weight of each block in each row: the step's, times the row's scale. Shape (row, block), float32."""
        weights: Floats = (self.values[np.ix_(steps, self.series)] * scale).astype(np.float32)
        return weights


def row_weights(gradients: Gradients) -> StepWeights:
    """Weights of the rows of every step, from the per-step tables of the store."""
    schedule, series = gradients.schedules()
    return StepWeights(-step_weights(schedule) * gradients.step_table(names.GRADIENT_SCALE)[:, None], series)


def _load_tests(source: Source, tests: tuple[int, int]) -> TestBlock:
    store = Gradients(source.gradients)
    rows = store.test_rows(source.checkpoint)
    stored = rows.features(slice(*tests), slice(0, store.layout.n_features))
    return decode_tests(stored, rows.scales(slice(*tests)), segments_of(store.layout))


def _partial_relevance(
    source: Source,
    plan: ReductionPlan,
    run: tuple[int, int],
    tests: TestBlock,
    weights: StepWeights,
    count_rows: Callable[[int], None],
) -> Floats:
    """What the rows of `run` add to the relevance, shape (sample, test)."""
    store = Gradients(source.gradients)
    segments = segments_of(store.layout)
    total: Floats = np.zeros((source.n_samples, tests.n_tests), np.float32)
    reading = plan.reading
    for rows in store.rows.pieces(run, reading.read_rows):
        weight = weights.of_rows(store.step_of_rows(rows), store.rows.scales(rows))
        samples = store.samples(rows)
        read = _reader(store, rows, reading.read_features)
        for low in range(0, len(samples), reading.score_rows):
            piece = slice(low, min(low + reading.score_rows, len(samples)))
            window = partial(read, piece)
            scores = score_rows(window, weight[piece], tests, segments, store.layout.n_features, reading.read_features)
            add_by_sample(total, samples[piece], scores)
            count_rows(len(scores))
    return total


def _reader(store: Gradients, rows: slice, features_at_once: int) -> Callable[[slice, int, int], NDArray[Any]]:
    """(piece of `rows`, first column, last column) -> stored values; whole rows are read once, for all pieces."""
    if features_at_once >= store.layout.n_features:
        whole = store.rows.features(rows, slice(0, store.layout.n_features))
        return lambda piece, low, high: whole[piece, low:high]

    def read(piece: slice, low: int, high: int) -> NDArray[Any]:
        return store.rows.features(slice(rows.start + piece.start, rows.start + piece.stop), slice(low, high))

    return read


def _write(relevance: Path, method: str, tests: tuple[int, int], partials: list[Floats]) -> None:
    total = partials[0]
    for more in partials[1:]:
        # a new array each time would be cleaner to look at and cost one more matrix of memory
        np.add(total, more, out=total)
    write_relevance(open_relevance(relevance, method), 0, tests[0], total)
