"""Methods that are weighted sums over stored rows, as a Dask graph for each pass.

R(i, j) = sum_t w(t) <r(i, t), h_j> (docs/methods.md), in one of the two orders of `plan/reduction.py`. Of `hydra`, the Hessian-free
relevance, w(t) = - alpha(t) c(t) (docs/architecture.md); those of other methods are in `weights.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from dask.delayed import Delayed, delayed
from numpy.typing import NDArray

from hydra_pipe.plan.reduction import SAMPLE_MULTIPLE, Found, ReductionPlan, Span
from hydra_pipe.plan.selection import cut
from hydra_pipe.reduction.blas import single_threaded_blas
from hydra_pipe.reduction.folds import Folder, folded_columns
from hydra_pipe.reduction.keeping import FactoredKeeper
from hydra_pipe.reduction.loops import add_rows
from hydra_pipe.reduction.methods import METHODS, Method
from hydra_pipe.reduction.norms import SquaredNorms, inverse_norms
from hydra_pipe.reduction.scores import ReadWindow, Scorer, TestBlock, decode_tests
from hydra_pipe.reduction.segments import DenseSegment, dense_segments, segments_of
from hydra_pipe.reduction.sharing import shared
from hydra_pipe.reduction.weights import Ints, StepWeights, checkpoint_of_steps, last_rows, row_weights
from hydra_pipe.store.arrays import Array
from hydra_pipe.store.gradients import Gradients, Prefix
from hydra_pipe.store.hypergradients import Hypergradients, write_folded
from hydra_pipe.store.probes import WhichTests
from hydra_pipe.store.relevance import write_relevance
from hydra_pipe.store.rows import Piece, check_within
from hydra_pipe.streams import Stream

Floats = NDArray[np.float32]
CountRows = Callable[[int], None]
# What rows add up to, by sample, which is the first dimension of every array. Score first: scores; fold first: hypergradients of
# what can be folded, and the scores of the rest where there is a rest.
Sums = tuple[Floats, ...]


@dataclass(frozen=True)
class Job:
    """What every task of a reduction needs to know; small, and the same for all of them.

    Args:
        gradients: path of the store.
        tested: which test gradients, the last where there are several.
        relevance: path of the array that is written to.
        of_features: whether that is the matrix of hypergradients, whose columns are features: what a sweep begins with is a unit
            vector of each then, and no test gradient.
        n_samples: training samples.
        tests: spans of test samples, in ascending order; what the plan counts are places among these.
        groups: where test samples are averaged: the group of each of them, shape (test,), else None.
        kept: path of the hypergradients to keep on the way, or to answer from; None: neither.
        plan: how.
        prefix: of the recording, where not all its steps count.
        method: name of it.
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
    plan: ReductionPlan
    prefix: Prefix | None = None
    method: str = "hydra"
    checkpoints: tuple[int, ...] = ()
    in_place: bool = True
    of_features: bool = False

    @property
    def asked(self) -> Method:
        """The method."""
        return METHODS[self.method]

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


def graphs(job: Job, count_rows: CountRows) -> Iterator[tuple[Span, Delayed]]:
    """The passes in order: what each answers (test samples where rows are scored first, else samples), and its graph.

    Building a graph reads nothing; computing it writes what it answers into the relevance array. Tasks read what they need from the
    store: what goes from one to another is sums by sample. A task that runs again gives the same, and writes the same bytes.

    Args:
        job: what is reduced, and how.
        count_rows: called with the number of rows that have been done.
    """
    if job.plan.order == "score first":
        score = _score_run if job.asked.of_tests else _square_run
        for tests in job.plan.test_blocks:
            yield tests, _pass_of_tests(job, score, _write, tests, count_rows)
    elif job.plan.order == "fold first":
        for samples in job.plan.sample_blocks:
            yield samples, _folding_pass(job, samples, count_rows)
    else:
        for tests in job.plan.test_blocks:
            yield tests, _pass_of_tests(job, _score_kept, _answer_kept, tests, count_rows)


def _pass_of_tests(
    job: Job, score: Callable[..., Sums], answer: Callable[..., None], tests: Span, count_rows: CountRows
) -> Delayed:
    """Scores of runs of rows for `tests`, added up, and what answers from each share of the samples."""
    scoring, answering = delayed(score), delayed(answer)
    partials = [scoring(job, run, tests, count_rows) for run in job.plan.row_runs]
    totals = _totals(job, partials, (0, job.n_samples))
    result: Delayed = delayed(_done)([answering(job, share, tests, sums) for share, sums in totals])
    return result


def _folding_pass(job: Job, samples: Span, count_rows: CountRows) -> Delayed:
    fold, answer = delayed(_fold_run), delayed(_answer)
    partials = [fold(job, run, samples, count_rows) for run in job.plan.row_runs]
    result: Delayed = delayed(_done)([answer(job, share, sums) for share, sums in _totals(job, partials, samples)])
    return result


def _totals(job: Job, partials: list[Delayed], samples: Span) -> Iterator[tuple[Span, Delayed]]:
    """The total of partial sums of `samples`, in as many shares as there are workers, each of which adds up one and answers it.

    So every partial sum leaves its process at most once. Few are added at once where shares are large, for all of them must be in
    one process then.
    """
    share, add = delayed(_share), delayed(_add)
    # in whole chunks of the relevance array
    n_chunks = -(-(samples[1] - samples[0]) // SAMPLE_MULTIPLE)
    n_shares = min(len(partials), n_chunks)
    bounds = [samples[0] + i * n_chunks // n_shares * SAMPLE_MULTIPLE for i in range(n_shares)] + [samples[1]]
    at_once = max(2, len(partials) if job.in_place else n_shares)
    for low, high in pairwise(bounds):
        sums = [share(partial, low - samples[0], high - samples[0]) for partial in partials]
        while len(sums) > 1:
            sums = [add(sums[i : i + at_once], job.in_place) for i in range(0, len(sums), at_once)]
        yield (low, high), sums[0]


def _share(sums: Sums, first: int, last: int) -> Sums:
    return tuple(array[first:last] for array in sums)


def _add(sums: list[Sums], in_place: bool) -> Sums:
    first, *others = sums
    if others and not in_place:
        first = tuple(array.copy() for array in first)
    for more in others:
        for mine, its in zip(first, more, strict=True):
            np.add(mine, its, out=mine)
    return first


def held_tests(job: Job, tests: Span, tested: WhichTests | None = None) -> AbstractContextManager[TestBlock]:
    """A block that has test gradients, those of the job where none are named."""
    of = job.tested if tested is None else tested
    key = ("tests", job.gradients, of, job.asked.cosine, cut(job.tests, *tests))
    return shared(key, lambda: _load_tests(job, tests, of))


def held_weights(job: Job, store: Gradients) -> AbstractContextManager[StepWeights]:
    """A block that has the weights of the steps."""
    return shared(("weights", job.gradients, job.prefix, job.method), lambda: row_weights(store, job.asked))


def held_last_rows(job: Job, store: Gradients) -> AbstractContextManager[Ints]:
    """A block that has the last row of each sample, ascending."""
    return shared(("last rows", job.gradients, job.prefix), lambda: last_rows(store, job.n_samples))


def _load_tests(job: Job, tests: Span, tested: WhichTests) -> TestBlock:
    store = job.store()
    rows, segments = tested.rows(store), segments_of(store.layout)
    spans = [slice(*span) for span in cut(job.tests, *tests)]
    stored = np.concatenate([rows.features(span, slice(0, store.layout.n_features)) for span in spans])
    scales = np.concatenate([rows.scales(span) for span in spans])
    if job.asked.cosine:
        norms = SquaredNorms(segments, store.layout.n_features, job.plan.reading.features)
        at_once = job.plan.reading.rows
        for low in range(0, len(stored), at_once):
            own = slice(low, low + at_once)
            squares = norms(partial(_window, stored[own]), scales[own].astype(np.float64) ** 2)
            scales[own] *= inverse_norms(squares)[:, None]
    return decode_tests(stored, scales, segments)


def _window(stored: NDArray[Any], first: int, last: int) -> NDArray[Any]:
    return stored[:, first:last]


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


def rows_of(store: Gradients, job: Job, run: Span, weights: StepWeights, last: Ints | None = None) -> Stream[Held]:
    """The rows of a run in order; where `last` is given, ascending, only those of them. Close it.

    Per-row columns are read for a whole file at once.
    """
    pieces = store.rows.stream(run, job.plan.reading.rows, last)
    return Stream(_held(store, job, pieces, weights, last), pieces.close)


def _held(store: Gradients, job: Job, pieces: Stream[Piece], weights: StepWeights, last: Ints | None) -> Iterator[Held]:
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


@single_threaded_blas
def _score_run(job: Job, run: Span, tests: Span, count_rows: CountRows) -> Sums:
    """What the rows of `run` add to the relevance for `tests`, shape (sample, column)."""
    store, averages = job.store(), job.averages()
    segments, n_features, at_once = segments_of(store.layout), store.layout.n_features, job.plan.reading.features
    norms = SquaredNorms(segments, n_features, at_once)
    n_columns = tests[1] - tests[0] if averages is None else averages.shape[1]
    total: Floats = np.zeros((job.n_samples, n_columns), np.float32)
    scorer, present = None, job.tested
    with (
        held_weights(job, store) as weights,
        held_last_rows(job, store) if job.asked.last_rows else nullcontext() as last,
        ExitStack() as held,
        closing(rows_of(store, job, run, weights, last)) as pieces,
    ):
        for rows in pieces:
            for own, tested in _by_checkpoint(job, rows):
                if scorer is None or present != tested:
                    scorer = None  # before the next one is loaded: a worker has the test gradients of one checkpoint
                    held.close()
                    block = held.enter_context(held_tests(job, tests, tested))
                    scorer, present = Scorer(block, segments, n_features, at_once), tested
                    del block
                weight = own.weight
                if job.asked.cosine:
                    weight = weight * inverse_norms(norms(own.read, weight.astype(np.float64) ** 2))[:, None]
                _add_scores(total, own.samples, scorer(own.read, weight), averages)
            count_rows(rows.n_read)
    return (total,)


def _by_checkpoint(job: Job, rows: Held) -> Iterator[tuple[Held, WhichTests]]:
    """`rows`, of one part and so in order of step, by the test gradients that they meet."""
    if len(job.checkpoints) < 2:
        yield rows, job.tested
        return
    used = checkpoint_of_steps(np.array(job.checkpoints), rows.steps)
    bounds = [0, *(np.flatnonzero(np.diff(used)) + 1), len(used)]
    for low, high in pairwise(bounds):
        yield rows if high - low == len(used) else rows.only(slice(low, high)), WhichTests(job.checkpoints[used[low]])


@single_threaded_blas
def _square_run(job: Job, run: Span, tests: Span, count_rows: CountRows) -> Sums:
    """What the rows of `run` add to the relevance of samples for themselves, shape (sample, 1)."""
    store = job.store()
    norms = SquaredNorms(segments_of(store.layout), store.layout.n_features, job.plan.reading.features)
    total: Floats = np.zeros((job.n_samples, tests[1] - tests[0]), np.float32)
    with (
        held_weights(job, store) as weights,
        closing(rows_of(store, job, run, StepWeights(np.ones_like(weights.values), weights.series))) as pieces,
    ):
        for rows in pieces:
            # the weight of a square is the step's times the square of the row's scale, which may be too small for float32
            weight = weights.values[np.ix_(rows.steps, weights.series)] * rows.weight.astype(np.float64) ** 2
            add_rows(norms(rows.read, weight).astype(np.float32)[:, None], rows.samples, total)
            count_rows(rows.n_read)
    return (total,)


def _add_scores(total: Floats, places: NDArray[np.int64], scores: Floats, averages: Floats | None) -> None:
    """Add what rows score, shape (row, test), to their places in `total`, shape (sample, column); not where they are negative."""
    add_rows(scores if averages is None else scores @ averages, places, total)


def _no_scores(n_samples: int, tests: TestBlock, averages: Floats | None) -> Floats:
    """Zeros to add scores to, shape (sample, column)."""
    return np.zeros((n_samples, tests.n_tests if averages is None else averages.shape[1]), np.float32)


@single_threaded_blas
def _fold_run(job: Job, run: Span, samples: Span, count_rows: CountRows) -> Sums:
    """What the rows of `run` add to the hypergradients of `samples`, and to the scores of what cannot be folded."""
    store, averages = job.store(), job.averages()
    segments, n_features, at_once = segments_of(store.layout), store.layout.n_features, job.plan.reading.features
    n_samples = samples[1] - samples[0]
    factored = [s for s in segments if not isinstance(s, DenseSegment)]
    folder = Folder([s for s in segments if isinstance(s, DenseSegment)], n_samples, n_features, at_once)
    scorer = scores = None
    # once is enough: what is factored is kept row by row, whatever the samples
    keeper = FactoredKeeper(store, job.kept) if job.kept is not None and samples[0] == 0 else None
    with ExitStack() as held:
        if factored:
            tests = held.enter_context(held_tests(job, (0, job.plan.test_blocks[-1][1])))
            scorer = Scorer(tests, factored, n_features, at_once)
            scores = _no_scores(n_samples, tests, averages)
        weights = held.enter_context(held_weights(job, store))
        for rows in held.enter_context(closing(rows_of(store, job, run, weights))):
            if keeper is not None:
                keeper.add(rows.rows, rows.read, rows.weight, rows.samples)
            places = rows.samples - samples[0]
            places[places >= n_samples] = -1
            folder.add(rows.read, rows.weight, places)
            if scorer is not None and scores is not None:
                _add_scores(scores, places, scorer(rows.read, rows.weight), averages)
            count_rows(len(places))
    return (folder.sums,) if scores is None else (folder.sums, scores)


@single_threaded_blas
def _answer(job: Job, samples: Span, sums: Sums) -> None:
    """Write the relevance of some samples for every test sample, and keep their hypergradients where they are to be kept."""
    folded, *scores = sums
    segments = dense_segments(job.store().layout)
    array, averages = Array.open(job.relevance), job.averages()
    if job.kept is not None and folded.shape[1]:
        write_folded(job.kept, samples[0], folded)
    for tests in job.plan.test_blocks:
        values = folded_columns(_load_tests(job, tests, job.tested).values, segments)
        columns = slice(*tests)
        if averages is not None:  # all test samples are one block then, and the columns are the groups
            values = averages.T @ values
            columns = slice(0, len(values))
        for low in range(0, samples[1] - samples[0], SAMPLE_MULTIPLE):
            own = slice(low, low + SAMPLE_MULTIPLE)
            found = folded[own] @ values.T
            for scored in scores:
                found += scored[own, columns]
            write_relevance(array, samples[0] + low, columns.start, found)


@single_threaded_blas
def _score_kept(job: Job, run: Span, tests: Span, count_rows: CountRows) -> Sums:
    """What factored rows of `run` add to the relevance for `tests`, shape (sample, column)."""
    kept, averages = _open_kept(job), job.averages()
    with held_tests(job, tests) as block:
        total = _no_scores(job.n_samples, block, averages)
        if kept.rows is None:
            return (total,)
        own = TestBlock(np.ascontiguousarray(block.values[:, kept.columns]), block.scale[:, kept.blocks])
        scorer = Scorer(own, segments_of(kept.layout), len(kept.columns), len(kept.columns))
        with closing(kept.rows.stream(run, job.plan.reading.rows)) as pieces:
            for piece in pieces:
                found, samples = scorer(piece.read, kept.rows.scales(piece.rows)), kept.samples(piece.rows)
                check_within(samples, job.n_samples, f"samples of {kept.path}")
                _add_scores(total, samples, found, averages)
                count_rows(len(found))
    return (total,)


@single_threaded_blas
def _answer_kept(job: Job, samples: Span, tests: Span, sums: Sums) -> None:
    """Write the relevance of some samples for some test samples: scores of what is factored, and products of the sums kept."""
    kept, (total,) = _open_kept(job), sums
    array = Array.open(job.relevance)
    first_column = tests[0] if job.groups is None else 0
    values = None
    if kept.folded is not None:
        segments, averages = dense_segments(job.store().layout), job.averages()
        with held_tests(job, tests) as block:
            values = folded_columns(block.values, segments)
        values = values if averages is None else averages.T @ values
    for low in range(samples[0], samples[1], SAMPLE_MULTIPLE):
        own = slice(low, min(low + SAMPLE_MULTIPLE, samples[1]))
        found = total[own.start - samples[0] : own.stop - samples[0]]
        if values is not None:
            found = found + kept.read_folded(own) @ values.T
        write_relevance(array, low, first_column, found)


def _open_kept(job: Job) -> Hypergradients:
    assert job.kept is not None
    return Hypergradients(job.kept, job.store())


def _write(job: Job, samples: Span, tests: Span, sums: Sums) -> None:
    """Write the relevance of some samples for some test samples."""
    write_relevance(Array.open(job.relevance), samples[0], tests[0] if job.groups is None else 0, sums[0])


def _done(answers: list[None]) -> Found:
    """Where the answers of a pass come together. It finds nothing to tell."""
    return {}
