"""Description of a reduction for its tasks, and the rows and test gradients that the tasks hold."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.plan.id_ranges import cut
from hydra_pipe.plan.records import TESTS_AT_ONCE, Plan, RowPlan
from hydra_pipe.reduction.column_groups import segments_of
from hydra_pipe.reduction.materialize import Expansion
from hydra_pipe.reduction.norms import SquaredNorms, inverse_norms
from hydra_pipe.reduction.scores import ReadWindow, TestBlock, decode_tests, window_of
from hydra_pipe.reduction.sharing import shared
from hydra_pipe.reduction.weights import RowUse, StepWeights, last_rows
from hydra_pipe.store.data.gradients import Gradients, Prefix
from hydra_pipe.store.data.preconditioner import Preconditioner
from hydra_pipe.store.data.probes import WhichTests
from hydra_pipe.store.data.rows import Piece, check_within
from hydra_pipe.streams import Stream
from hydra_pipe.types import F32, I64, Span

P = TypeVar("P", bound=Plan, covariant=True)


@dataclass(frozen=True)
class ReductionJob(Generic[P]):
    """Settings that every task of a reduction needs. Small, and the same for all tasks.

    Args:
        gradients: path of the store with the rows.
        tested: test gradients that are used, the last ones if there are several.
        relevance: path of the array that is written to, or of the group of the top samples.
        n_samples: number of training samples.
        tests: spans of test samples, ascending. The plan counts places among these samples.
        groups: group of each test sample, shape (test,), int64. None: no averages are taken.
        kept: path of the hypergradients to keep on the way, or to answer from. None: neither.
        plan: plan that the solver has made.
        rows: rows that count, and their weights.
        prefix: the first steps of the recording that count. None: all steps count.
        checkpoints: steps of all test gradients that are used, ascending. Empty: only `tested`.
        in_place: True if sums may be added up in place. Allowed only if a task never runs twice and
            no other process holds its input. A cluster recomputes lost results from the results
            that it still has, so there it is False.
        top: number of samples on each side that are written of each column. None: all samples.
    """

    gradients: Path
    tested: WhichTests
    relevance: Path
    n_samples: int
    tests: tuple[Span, ...]
    groups: NDArray[np.int64] | None
    kept: Path | None
    plan: P
    rows: RowUse
    prefix: Prefix | None = None
    checkpoints: tuple[int, ...] = ()
    in_place: bool = True
    top: int | None = None

    def store(self) -> Gradients:
        """Open the recording anew: an open store cannot travel to other processes."""
        return Gradients(self.gradients, self.prefix)

    def preconditioner(self, store: Gradients) -> Preconditioner | None:
        """Return D^(1/2) of the moment of the test gradients; None if rows need none."""
        return store.preconditioner(self.tested.step)

    def averages(self) -> F32 | None:
        """Return the matrix that averages test samples into columns, shape (test, group), float32.

        None if each test sample is a column.
        """
        if self.groups is None:
            return None
        of_group: F32 = np.zeros((len(self.groups), int(self.groups.max()) + 1), np.float32)
        of_group[np.arange(len(self.groups)), self.groups] = (
            1 / np.bincount(self.groups)[self.groups]
        )
        return of_group


def held_tests(
    job: ReductionJob[RowPlan], tests: Span, tested: WhichTests | None = None
) -> AbstractContextManager[TestBlock]:
    """Return a context that holds test gradients: `tested`, or the job's own if it is None."""
    of = job.tested if tested is None else tested
    key = ("tests", job.gradients, of, job.rows.cosine, cut(job.tests, *tests))
    return shared(key, lambda: load_tests(job, tests, of))


def held_weights(job: ReductionJob[Any], store: Gradients) -> AbstractContextManager[StepWeights]:
    """Return a context that holds the weights of the steps."""
    return shared(
        ("weights", job.gradients, job.prefix, job.rows.weigh), lambda: job.rows.weigh(store)
    )


def held_last_rows(job: ReductionJob[Any], store: Gradients) -> AbstractContextManager[I64]:
    """Return a context that holds the last row of each sample, ascending."""
    return shared(("last rows", job.gradients, job.prefix), lambda: last_rows(store, job.n_samples))


def load_tests(job: ReductionJob[RowPlan], tests: Span, tested: WhichTests) -> TestBlock:
    store = job.store()
    rows, segments = tested.rows(store), segments_of(store.layout)
    preconditioner = store.preconditioner(tested.step)
    spans = [slice(*span) for span in cut(job.tests, *tests)]
    stored = np.concatenate(
        [rows.features(span, slice(0, store.layout.n_features)) for span in spans]
    )
    scales = np.concatenate([rows.scales(span) for span in spans])
    if job.rows.cosine:
        norms = SquaredNorms(
            segments, store.layout.n_features, job.plan.reading.features, preconditioner
        )
        at_once = job.plan.reading.rows
        for low in range(0, len(stored), at_once):
            own = slice(low, low + at_once)
            squares = norms(window_of(stored[own]), scales[own].astype(np.float64) ** 2)
            scales[own] *= inverse_norms(squares)[:, None]
    return decode_tests(stored, scales, segments, preconditioner)


def columns_of_tests(
    store: Gradients, job: ReductionJob[Any], expansion: Expansion, columns: Span
) -> F32:
    """Return test gradients or their means, multiplied out, shape (column, feature), float32."""
    rows, averages = job.tested.rows(store), job.averages()
    tests = columns if averages is None else (0, len(averages))
    found: F32 = np.zeros((columns[1] - columns[0], expansion.width), np.float32)
    place = 0
    for first, last in cut(job.tests, *tests):
        for low in range(first, last, TESTS_AT_ONCE):
            own = slice(low, min(low + TESTS_AT_ONCE, last))
            out = np.empty((own.stop - own.start, expansion.width), np.float32)
            expansion.expand(
                rows.features(own, slice(0, store.layout.n_features)), rows.scales(own), out
            )
            if averages is None:
                found[place : place + len(out)] = out
            else:
                found += averages[place : place + len(out), columns[0] : columns[1]].T @ out
            place += len(out)
    return found


@dataclass(frozen=True)
class Held:
    """Rows that a worker works on at one time.

    Args:
        rows: range of rows in the store. After `only`, the range that contains the chosen rows.
        read: function that returns stored columns of the rows.
        weight: weight of each block in each row, shape (row, block).
        samples: sample of each row, shape (row,), int64.
        steps: step of each row, shape (row,), int64.
        n_read: number of rows that were read to get these.
    """

    rows: slice
    read: ReadWindow
    weight: F32
    samples: I64
    steps: I64
    n_read: int

    def only(self, places: "I64 | slice") -> "Held":
        """Return the rows at some places."""
        read = self.read
        return Held(
            self.rows,
            lambda first, last: read(first, last)[places],
            self.weight[places],
            self.samples[places],
            self.steps[places],
            self.n_read,
        )


def rows_of(
    store: Gradients,
    job: ReductionJob[RowPlan],
    run: Span,
    weights: StepWeights,
    last: I64 | None = None,
) -> Stream[Held]:
    """Stream the rows of a run in order. Close the stream after use.

    Samples, steps and scales are read for a whole file at once.

    Args:
        store: the recording.
        job: description of the reduction.
        run: the first row and one past the last.
        weights: weights of the steps.
        last: rows to keep, ascending. None: all rows.
    """
    pieces = store.rows.stream(run, job.plan.reading.rows, last)
    return Stream(_held(store, job, pieces, weights, last), pieces.close)


def _held(
    store: Gradients,
    job: ReductionJob[RowPlan],
    pieces: Stream[Piece],
    weights: StepWeights,
    last: I64 | None,
) -> Iterator[Held]:
    beside = slice(0, 0)
    for piece in pieces:
        if piece.rows.start >= beside.stop:
            beside = slice(piece.rows.start, store.rows.end_of_file(piece.rows.start))
            samples, steps = store.samples(beside), store.step_of_rows(beside)
            check_within(samples, job.n_samples, f"samples of {store.path}")
            check_within(steps, len(weights.values), f"steps of {store.path}")
            weight = weights.of_rows(steps, store.rows.scales(beside))
        own = slice(piece.rows.start - beside.start, piece.rows.stop - beside.start)
        held = Held(
            piece.rows, piece.read, weight[own], samples[own], steps[own], own.stop - own.start
        )
        if last is not None:
            places = (
                last[
                    np.searchsorted(last, piece.rows.start) : np.searchsorted(last, piece.rows.stop)
                ]
                - piece.rows.start
            )
            held = held if len(places) == held.n_read else held.only(places)
        yield held
