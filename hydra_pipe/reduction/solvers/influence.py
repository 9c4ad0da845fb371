"""Method `influence`, out of core: the empirical Fisher's matrix, built and solved in one task.

The matrix is made from the last row of each sample. `maths/influence.py` has the equations. The two
ways of `plan/influence.py` give the same result.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from dask.delayed import Delayed, delayed
from numpy.typing import NDArray

from hydra_pipe.maths.influence import damped, inverse_damping
from hydra_pipe.plan.influence import InfluencePlan, SolveInput, plan_solve
from hydra_pipe.plan.records import Answered, Found, ReductionInput
from hydra_pipe.reduction.answers import Answers, finish
from hydra_pipe.reduction.column_groups import segments_of
from hydra_pipe.reduction.executors.base import CountRows
from hydra_pipe.reduction.job import (
    Held,
    ReductionJob,
    columns_of_tests,
    held_last_rows,
    held_tests,
    held_weights,
    rows_of,
)
from hydra_pipe.reduction.kernels import Workspace
from hydra_pipe.reduction.materialize import Expansion
from hydra_pipe.reduction.scores import Scorer, TestBlock, decode_tests
from hydra_pipe.reduction.solvers.base import Course, Units
from hydra_pipe.reduction.solvers.result import ReadingSolver
from hydra_pipe.reduction.weights import StepWeights
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.streams import Stream
from hydra_pipe.types import F32, F64, I64, Span


class Influence(ReadingSolver[InfluencePlan]):
    """Solver of a linear system over the last row of each sample, in one pass."""

    divided_by_memory = True

    def plan(self, given: ReductionInput, after: Answered | None) -> InfluencePlan:
        """See `CommonSolver`."""
        assert self.request.last is not None
        return plan_solve(
            SolveInput(given, self.gradients.layout.whole_width, len(self.request.last))
        )

    def units(self, given: ReductionInput, plan: InfluencePlan) -> Units:
        """See `Solver`."""
        n_rows = given.n_read * plan.passes
        return Units(n_rows, n_rows, "rows")

    def passes(
        self, course: Course[InfluencePlan], count_rows: CountRows
    ) -> Iterator[tuple[Span, Delayed]]:
        """See `Solver`. The pass finds the least damping of any block."""
        answered = (0, course.plan.test_blocks[-1][1])
        yield answered, delayed(influence)(self.job(course.plan, course.given), count_rows)


def influence(job: ReductionJob[InfluencePlan], count_rows: CountRows) -> Found:
    """Fill the relevance. BLAS keeps all its threads, because this is the only task.

    Returns:
        The least damping of any block.
    """
    store = job.store()
    with held_weights(job, store) as weights, held_last_rows(job, store) as last:
        return _influence(job, _LastRows(job, store, weights, last, count_rows))


def _influence(job: ReductionJob[InfluencePlan], rows: "_LastRows") -> Found:
    matrix = (_by_features if job.plan.by_features else _by_samples)(job, rows)
    answers = _answers_by_features if job.plan.by_features else _answers_by_samples
    for tests in job.plan.test_blocks:
        found = answers(job, rows, matrix, tests)
        first_column = tests[0] if job.groups is None else 0
        relevance: F32 = np.zeros((job.n_samples, found.shape[1]), np.float32)
        relevance[rows.samples] = found / max(1, len(found))
        written = Answers(job, first_column, relevance.shape[1])
        written.add(0, relevance)
        finish(job, first_column, [written.ranking])
    return {
        names.DAMPING: 1 / max(float(rows.inverse_damping.max()), float(np.finfo(np.float64).tiny))
    }


@dataclass(frozen=True)
class _Piece:
    """Some of the last rows, and their places among all last rows."""

    held: Held
    places: slice


class _LastRows:
    """The last row of each sample, in order: g_i = c |B| r(i, t). They can be read several times.

    Args:
        job: description of the reduction.
        store: the recording.
        weights: weights of its steps.
        last: numbers of the last rows, ascending, shape (place,), int64.
        count_rows: function called with the number of rows that have been read.
    """

    def __init__(
        self,
        job: ReductionJob[InfluencePlan],
        store: Gradients,
        weights: StepWeights,
        last: I64,
        count_rows: CountRows,
    ) -> None:
        self.job, self._count_rows = job, count_rows
        self.store, self._weights, self._last = store, weights, last
        schedule, series = self.store.schedules()
        # 1 / Lambda of each block
        self.inverse_damping: F64 = inverse_damping(schedule)[series]
        self._n_rows = self.store.rows_of_steps()[1]
        self.samples: NDArray[np.int64] = np.empty(len(self._last), np.int64)
        self._n_read = 0  # rows read in a pass over all last rows, once a pass has ended

    def __len__(self) -> int:
        return len(self._last)

    def held(self, first: int, last: int) -> Stream[_Piece]:
        """Stream the rows at places [first, last), at most a file at a time.

        The rows are not counted as progress. Close the stream after use.
        """
        run = (int(self._last[first]), int(self._last[last - 1]) + 1)
        rows = rows_of(self.store, self.job, run, self._weights, self._last)
        return Stream(self._placed(rows, first), rows.close)

    def _placed(self, rows: Stream[Held], start: int) -> Iterator[_Piece]:
        for held in rows:
            places = slice(start, start + len(held.samples))
            self.samples[places] = held.samples
            yield _Piece(held, places)
            start = places.stop

    def pieces(self, first: int = 0) -> Stream[_Piece]:
        """Stream the rows from place `first` on. Close the stream after use.

        The rows are counted as progress. Rows before `first` are counted too, as if they were read.
        """
        held = self.held(first, len(self))
        return Stream(self._counted(held), held.close)

    def _counted(self, pieces: Stream[_Piece]) -> Iterator[_Piece]:
        n_read = 0
        for piece in pieces:
            yield piece
            n_read += piece.held.n_read
            self._count_rows(piece.held.n_read)
        self._n_read = max(self._n_read, n_read)
        self._count_rows(self._n_read - n_read)

    def undamped(self, piece: _Piece) -> F32:
        """Return the weights of the rows of G Lambda^-1, shape (row, block), float32."""
        weights: F32 = (piece.held.weight * self.inverse_damping).astype(np.float32)
        return weights

    def curvature(self, piece: _Piece) -> F64:
        """Return d_i = rho_i / N of each row, in the units of g_i, shape (row,), float64.

        If c |B| differs from the number of rows of the step in its process, the loss behind the
        rows was scaled by the ratio of the two. rho was then scaled by the inverse of the ratio. A
        ratio below 0 is of an optimiser that maximises. The loss times -1 has the same rho.
        """
        held, rows = piece.held, self._last[piece.places]
        rho = self.store.curvature(held.rows)[rows - held.rows.start].astype(np.float64)
        part = np.searchsorted(np.cumsum(self.store.rows.part_rows), rows, side="right")
        ratio = self._weights.values[held.steps, 0] / self._n_rows[held.steps, part]
        scaled = np.where(ratio != 0, np.abs(ratio), np.inf)
        return np.where(np.isnan(rho), 1.0, rho) / scaled / len(self)


def _by_samples(job: ReductionJob[InfluencePlan], rows: _LastRows) -> F64:
    """Return A D + I, shape (place, place), float64."""
    store, n = rows.store, len(rows)
    segments, n_features = segments_of(store.layout), store.layout.n_features
    matrix, d = np.empty((n, n)), np.empty(n)
    for low, high in job.plan.held_blocks:
        held = _held_block(rows, low, high)
        scorer = Scorer(held, segments, n_features, job.plan.reading.features)
        with closing(rows.pieces(low)) as pieces:
            for piece in pieces:
                scores = scorer(piece.held.read, rows.undamped(piece))
                matrix[piece.places, low:high], matrix[low:high, piece.places] = scores, scores.T
                d[piece.places] = rows.curvature(piece)
    matrix *= d
    return damped(matrix)


def _held_block(rows: _LastRows, low: int, high: int) -> TestBlock:
    """Load the last rows at places [low, high) as a block that other rows are scored against."""
    n_features = rows.store.layout.n_features
    stored = np.empty((high - low, n_features), rows.store.rows.dtype)
    weight: F32 = np.empty((high - low, len(rows.store.layout.blocks)), np.float32)
    with closing(rows.held(low, high)) as pieces:
        for piece in pieces:
            own = slice(piece.places.start - low, piece.places.stop - low)
            stored[own], weight[own] = piece.held.read(0, n_features), piece.held.weight
    return decode_tests(
        stored, weight, segments_of(rows.store.layout), rows.job.preconditioner(rows.store)
    )


def _answers_by_samples(
    job: ReductionJob[InfluencePlan], rows: _LastRows, matrix: F64, tests: Span
) -> F32:
    """Return (A D + I)^-1 G Lambda^-1 H.T, shape (place, column), float32."""
    layout, averages = rows.store.layout, job.averages()
    sides: F32 = np.empty(
        (len(rows), tests[1] - tests[0] if averages is None else averages.shape[1]), np.float32
    )
    with held_tests(job, tests) as block, closing(rows.pieces()) as pieces:
        scorer = Scorer(block, segments_of(layout), layout.n_features, job.plan.reading.features)
        for piece in pieces:
            scores = scorer(piece.held.read, rows.undamped(piece))
            sides[piece.places] = scores if averages is None else scores @ averages
    del scorer, block
    return _solved(matrix, sides)


def _by_features(job: ReductionJob[InfluencePlan], rows: _LastRows) -> F64:
    """Return Lambda^-1/2 F Lambda^-1/2 + I, shape (feature, feature), float64."""
    expanded = _Expanded(rows)
    matrix = np.zeros((expanded.width, expanded.width))
    with closing(rows.pieces()) as pieces:
        for piece in pieces:
            own = expanded(piece)
            own *= np.sqrt(rows.curvature(piece)).astype(np.float32)[:, None]
            matrix += own.T @ own
    return damped(matrix)


def _answers_by_features(
    job: ReductionJob[InfluencePlan], rows: _LastRows, matrix: F64, tests: Span
) -> F32:
    """Return G (F + Lambda)^-1 H.T, shape (place, column), float32."""
    columns = tests if job.groups is None else (0, int(job.groups.max()) + 1)
    expanded = _Expanded(rows)
    sides = columns_of_tests(rows.store, job, expanded.expansion, columns)
    sides *= expanded.root
    solved = _solved(matrix, sides.T)
    found: F32 = np.empty((len(rows), solved.shape[1]), np.float32)
    with closing(rows.pieces()) as pieces:
        for piece in pieces:
            found[piece.places] = expanded(piece) @ solved
    return found


class _Expanded:
    """Rows of G Lambda^-1/2 with factored blocks multiplied out. The next call reuses the buffer.

    Args:
        rows: the last rows.
    """

    def __init__(self, rows: _LastRows) -> None:
        layout, found = rows.store.layout, rows.job.preconditioner(rows.store)
        self._n_features, self._workspace = layout.n_features, Workspace()
        # the same D^(1/2) as in the space of samples, so that the plan does not change the answer
        self.expansion = Expansion(layout, None if found is None else found.rank_one(layout))
        self.width = self.expansion.width
        # square root of Lambda^-1, shape (feature,)
        self.root: F32 = np.empty(self.width, np.float32)
        for first, last, block in self.expansion.spans:
            self.root[first:last] = np.sqrt(rows.inverse_damping[block])

    def __call__(self, piece: _Piece) -> F32:
        held = piece.held
        out = self._workspace.matrix(len(held.samples), self.width)
        self.expansion.expand(held.read(0, self._n_features), held.weight, out)
        out *= self.root
        return out


def _solved(matrix: F64, sides: F32) -> F32:
    return np.linalg.solve(matrix, sides.astype(np.float64)).astype(np.float32)
