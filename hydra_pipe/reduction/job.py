"""What the tasks of a reduction are told, and the rows and test gradients that they hold."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.plan.records import TESTS_AT_ONCE, Plan, RowPlan, Span
from hydra_pipe.plan.selection import cut
from hydra_pipe.reduction.expansion import Expansion
from hydra_pipe.reduction.norms import SquaredNorms, inverse_norms
from hydra_pipe.reduction.scores import ReadWindow, TestBlock, decode_tests
from hydra_pipe.reduction.segments import segments_of
from hydra_pipe.reduction.sharing import shared
from hydra_pipe.reduction.weights import Ints, RowUse, StepWeights, last_rows
from hydra_pipe.store.gradients import Gradients, Prefix
from hydra_pipe.store.probes import WhichTests
from hydra_pipe.store.rows import Piece, check_within
from hydra_pipe.streams import Stream

Floats = NDArray[np.float32]
P = TypeVar("P", bound=Plan, covariant=True)


@dataclass(frozen=True)
class Job(Generic[P]):
    """What every task of a reduction needs to know; small, and the same for all of them.

    Args:
        gradients: path of the store.
        tested: which test gradients, the last where there are several.
        relevance: path of the array that is written to.
        n_samples: training samples.
        tests: spans of test samples, in ascending order; what the plan counts are places among these.
        groups: where test samples are averaged: the group of each of them, shape (test,), else None.
        kept: path of the hypergradients to keep on the way, or to answer from; None: neither.
        plan: how, as the solver has planned.
        rows: which rows count, and with what.
        prefix: of the recording, where not all its steps count.
        checkpoints: steps of all test gradients that are used, ascending; empty: those of `tested` alone.
        in_place: sums may be added up in place. Only where a task never runs twice and no other process holds its input: not on a
            cluster, which computes again what it has lost from what it still has.
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

    def store(self) -> Gradients:
        """The recording, opened anew: what is open does not travel to other processes."""
        return Gradients(self.gradients, self.prefix)

    def averages(self) -> Floats | None:
        """What test samples are multiplied by to give the columns, shape (test, group); None where each is a column."""
        if self.groups is None:
            return None
        of_group: Floats = np.zeros((len(self.groups), int(self.groups.max()) + 1), np.float32)
        of_group[np.arange(len(self.groups)), self.groups] = 1 / np.bincount(self.groups)[self.groups]
        return of_group


def held_tests(job: Job[RowPlan], tests: Span, tested: WhichTests | None = None) -> AbstractContextManager[TestBlock]:
    """A block that has test gradients, those of the job where none are named."""
    of = job.tested if tested is None else tested
    key = ("tests", job.gradients, of, job.rows.cosine, cut(job.tests, *tests))
    return shared(key, lambda: load_tests(job, tests, of))


def held_weights(job: Job[Any], store: Gradients) -> AbstractContextManager[StepWeights]:
    """A block that has the weights of the steps."""
    return shared(("weights", job.gradients, job.prefix, job.rows.weigh), lambda: job.rows.weigh(store))


def held_last_rows(job: Job[Any], store: Gradients) -> AbstractContextManager[Ints]:
    """A block that has the last row of each sample, ascending."""
    return shared(("last rows", job.gradients, job.prefix), lambda: last_rows(store, job.n_samples))


def load_tests(job: Job[RowPlan], tests: Span, tested: WhichTests) -> TestBlock:
    store = job.store()
    rows, segments = tested.rows(store), segments_of(store.layout)
    spans = [slice(*span) for span in cut(job.tests, *tests)]
    stored = np.concatenate([rows.features(span, slice(0, store.layout.n_features)) for span in spans])
    scales = np.concatenate([rows.scales(span) for span in spans])
    if job.rows.cosine:
        norms = SquaredNorms(segments, store.layout.n_features, job.plan.reading.features)
        at_once = job.plan.reading.rows
        for low in range(0, len(stored), at_once):
            own = slice(low, low + at_once)
            squares = norms(partial(_window, stored[own]), scales[own].astype(np.float64) ** 2)
            scales[own] *= inverse_norms(squares)[:, None]
    return decode_tests(stored, scales, segments)


def _window(stored: NDArray[Any], first: int, last: int) -> NDArray[Any]:
    return stored[:, first:last]


def columns_of_tests(store: Gradients, job: Job[Any], expansion: Expansion, columns: Span) -> Floats:
    """Test gradients multiplied out, or means of them, shape (column, feature)."""
    rows, averages = job.tested.rows(store), job.averages()
    tests = columns if averages is None else (0, len(averages))
    found: Floats = np.zeros((columns[1] - columns[0], expansion.width), np.float32)
    place = 0
    for first, last in cut(job.tests, *tests):
        for low in range(first, last, TESTS_AT_ONCE):
            own = slice(low, min(low + TESTS_AT_ONCE, last))
            out = np.empty((own.stop - own.start, expansion.width), np.float32)
            expansion.expand(rows.features(own, slice(0, store.layout.n_features)), rows.scales(own), out)
            if averages is None:
                found[place : place + len(out)] = out
            else:
                found += averages[place : place + len(out), columns[0] : columns[1]].T @ out
            place += len(out)
    return found


@dataclass(frozen=True)
class Held:
    """Some rows in a worker's hands.

    Args:
        rows: which they are, or, of some of these, between which they are.
        read: gives their columns.
        weight: of each block in each of them, shape (row, block).
        samples, steps: of each, shape (row,).
        n_read: rows that were read for it.
    """

    rows: slice
    read: ReadWindow
    weight: Floats
    samples: Ints
    steps: Ints
    n_read: int

    def only(self, places: "Ints | slice") -> "Held":
        """Some of them."""
        read = self.read
        return Held(
            self.rows,
            lambda first, last: read(first, last)[places],
            self.weight[places],
            self.samples[places],
            self.steps[places],
            self.n_read,
        )


def rows_of(store: Gradients, job: Job[RowPlan], run: Span, weights: StepWeights, last: Ints | None = None) -> Stream[Held]:
    """The rows of a run in order; where `last` is given, ascending, only those of them. Close it.

    Per-row columns are read for a whole file at once.
    """
    pieces = store.rows.stream(run, job.plan.reading.rows, last)
    return Stream(_held(store, job, pieces, weights, last), pieces.close)


def _held(store: Gradients, job: Job[RowPlan], pieces: Stream[Piece], weights: StepWeights, last: Ints | None) -> Iterator[Held]:
    beside = slice(0, 0)
    for piece in pieces:
        if piece.rows.start >= beside.stop:
            beside = slice(piece.rows.start, store.rows.end_of_file(piece.rows.start))
            samples, steps = store.samples(beside), store.step_of_rows(beside)
            check_within(samples, job.n_samples, f"samples of {store.path}")
            check_within(steps, len(weights.values), f"steps of {store.path}")
            weight = weights.of_rows(steps, store.rows.scales(beside))
        own = slice(piece.rows.start - beside.start, piece.rows.stop - beside.start)
        held = Held(piece.rows, piece.read, weight[own], samples[own], steps[own], own.stop - own.start)
        if last is not None:
            places = last[np.searchsorted(last, piece.rows.start) : np.searchsorted(last, piece.rows.stop)] - piece.rows.start
            held = held if len(places) == held.n_read else held.only(places)
        yield held
