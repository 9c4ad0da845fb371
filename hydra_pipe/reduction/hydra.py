"""Method `hydra`: the Hessian-free relevance as a weighted sum over stored rows, as a Dask graph for each pass.

R(i, j) = - sum_t alpha(t) c(t) <r(i, t), h_j> (docs/architecture.md), in one of the two orders of `plan/reduction.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from dask.delayed import Delayed, delayed
from numpy.typing import NDArray

from hydra_pipe.maths.relevance import add_by_sample
from hydra_pipe.maths.schedule import step_weights
from hydra_pipe.plan.reduction import SAMPLE_MULTIPLE, ReductionPlan, Span
from hydra_pipe.plan.selection import cut
from hydra_pipe.reduction.folds import Folder, folded_columns
from hydra_pipe.reduction.keeping import FactoredKeeper
from hydra_pipe.reduction.scores import ReadWindow, Scorer, TestBlock, decode_tests
from hydra_pipe.reduction.segments import DenseSegment, segments_of
from hydra_pipe.store import names
from hydra_pipe.store.arrays import Array
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.hypergradients import Hypergradients, write_folded
from hydra_pipe.store.relevance import write_relevance

Floats = NDArray[np.float32]
CountRows = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """What every task of a reduction needs to know; small, and the same for all of them.

    Args:
        gradients: path of the store.
        checkpoint: step of the test gradients.
        relevance: path of the array that is written to.
        n_samples: training samples.
        tests: spans of test samples, in ascending order; what the plan counts are places among these.
        kept: path of the hypergradients to keep on the way, or to answer from; None: neither.
        groups: where test samples are averaged: the group of each of them, shape (test,), else None.
        plan: how.
    """

    gradients: Path
    checkpoint: int
    relevance: Path
    n_samples: int
    tests: tuple[Span, ...]
    groups: NDArray[np.int64] | None
    kept: Path | None
    plan: ReductionPlan

    def averages(self) -> Floats | None:
        """What test samples are multiplied by to give the columns, shape (test, group); None where each is a column."""
        if self.groups is None:
            return None
        of_group: Floats = np.zeros((len(self.groups), int(self.groups.max()) + 1), np.float32)
        of_group[np.arange(len(self.groups)), self.groups] = 1 / np.bincount(self.groups)[self.groups]
        return of_group


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


def graphs(job: Job, weights: StepWeights, count_rows: CountRows) -> Iterator[tuple[Span, Delayed]]:
    """The passes in order: what each answers (test samples where rows are scored first, else samples), and its graph.

    Building a graph reads nothing; computing it writes what it answers into the relevance array.

    Args:
        job: what is reduced, and how.
        weights: of the rows of every step.
        count_rows: called with the number of rows that have been done.
    """
    shared = delayed(weights, pure=False)
    if job.plan.order == "score first":
        for tests in job.plan.test_blocks:
            yield tests, _scoring_pass(job, tests, shared, count_rows)
    elif job.plan.order == "fold first":
        for samples in job.plan.sample_blocks:
            yield samples, _folding_pass(job, samples, shared, count_rows)
    else:
        for tests in job.plan.test_blocks:
            yield tests, _kept_pass(job, tests, count_rows)


def _scoring_pass(job: Job, tests: Span, weights: Delayed, count_rows: CountRows) -> Delayed:
    test_block = delayed(_load_tests)(job, tests)
    add_up = delayed(_score_run)
    partials = [add_up(job, run, test_block, weights, count_rows) for run in job.plan.row_runs]
    result: Delayed = delayed(_write)(job, tests, partials)
    return result


def _folding_pass(job: Job, samples: Span, weights: Delayed, count_rows: CountRows) -> Delayed:
    plan = job.plan
    all_tests = (0, plan.test_blocks[-1][1])
    factored = delayed(_load_factored_tests)(job, all_tests)
    fold = delayed(_fold_run)
    folded = delayed(_merge)([fold(job, run, samples, factored, weights, count_rows) for run in plan.row_runs])
    # each worker answers a share of the samples, in whole chunks, for one block of test samples after the other
    n_shares = len(plan.row_runs)
    n_chunks = -(-(samples[1] - samples[0]) // SAMPLE_MULTIPLE)
    bounds = [min(samples[0] + i * n_chunks // n_shares * SAMPLE_MULTIPLE, samples[1]) for i in range(n_shares)] + [samples[1]]
    answer = delayed(_answer)
    answers = [
        answer(job, samples[0], (low, high), tests, folded)
        for low, high in pairwise(bounds)
        if low < high
        for tests in plan.test_blocks
    ]
    result: Delayed = delayed(_done)(answers)
    return result


def _kept_pass(job: Job, tests: Span, count_rows: CountRows) -> Delayed:
    """From kept hypergradients: scores of what is factored by runs of rows, then the product of the sums with the test samples."""
    test_block = delayed(_load_tests)(job, tests)
    score = delayed(_score_kept)
    partials = [score(job, run, test_block, count_rows) for run in job.plan.row_runs]
    result: Delayed = delayed(_answer_kept)(job, tests, test_block, partials)
    return result


def _score_kept(job: Job, run: Span, tests: TestBlock, count_rows: CountRows) -> Floats:
    """What factored rows of `run` add to the relevance, shape (sample, column)."""
    kept = _open_kept(job)
    averages = job.averages()
    total: Floats = np.zeros((job.n_samples, tests.n_tests if averages is None else averages.shape[1]), np.float32)
    if kept.rows is None:
        return total
    own = TestBlock(np.ascontiguousarray(tests.values[:, kept.columns]), tests.scale[:, kept.blocks])
    scorer = Scorer(own, segments_of(kept.layout), len(kept.columns), len(kept.columns))
    for piece in kept.rows.stream(run, job.plan.reading.rows):
        found = scorer(piece.read, kept.rows.scales(piece.rows))
        add_by_sample(total, kept.samples(piece.rows), found if averages is None else found @ averages)
        count_rows(len(found))
    return total


def _answer_kept(job: Job, tests: Span, test_block: TestBlock, partials: list[Floats]) -> None:
    kept, segments = _open_kept(job), segments_of(Gradients(job.gradients).layout)
    total = partials[0]
    for more in partials[1:]:
        np.add(total, more, out=total)
    if kept.folded is not None:
        values = folded_columns(test_block.values, [s for s in segments if isinstance(s, DenseSegment)])
        averages = job.averages()
        values = values if averages is None else averages.T @ values
        for low in range(0, job.n_samples, kept.folded.file_rows):
            own = slice(low, min(low + kept.folded.file_rows, job.n_samples))
            total[own] += kept.read_folded(own) @ values.T
    write_relevance(Array.open(job.relevance), 0, tests[0] if job.groups is None else 0, total)


def _open_kept(job: Job) -> Hypergradients:
    assert job.kept is not None
    return Hypergradients(job.kept, Gradients(job.gradients))


def _load_tests(job: Job, tests: Span) -> TestBlock:
    store = Gradients(job.gradients)
    rows = store.test_rows(job.checkpoint)
    spans = [slice(*span) for span in cut(job.tests, *tests)]
    stored = np.concatenate([rows.features(span, slice(0, store.layout.n_features)) for span in spans])
    scales = np.concatenate([rows.scales(span) for span in spans])
    return decode_tests(stored, scales, segments_of(store.layout))


def _load_factored_tests(job: Job, tests: Span) -> TestBlock | None:
    """The test block for what is scored and not folded, or None where everything is folded."""
    segments = segments_of(Gradients(job.gradients).layout)
    return None if all(isinstance(s, DenseSegment) for s in segments) else _load_tests(job, tests)


@dataclass(frozen=True)
class _Rows:
    """Some rows in a worker's hands: which, how to read their columns, their weights, and their samples."""

    rows: slice
    read: ReadWindow
    weight: Floats
    samples: NDArray[np.int64]


def _rows_of(store: Gradients, job: Job, run: Span, weights: StepWeights) -> Iterator[_Rows]:
    """The rows of a run in order. Per-row columns are read for a whole file at once."""
    beside = slice(0, 0)
    for piece in store.rows.stream(run, job.plan.reading.rows):
        if piece.rows.start >= beside.stop:
            beside = slice(piece.rows.start, store.rows.end_of_file(piece.rows.start))
            scales, samples, steps = store.rows.scales(beside), store.samples(beside), store.step_of_rows(beside)
        own = slice(piece.rows.start - beside.start, piece.rows.stop - beside.start)
        yield _Rows(piece.rows, piece.read, weights.of_rows(steps[own], scales[own]), samples[own])


def _score_run(job: Job, run: Span, tests: TestBlock, weights: StepWeights, count_rows: CountRows) -> Floats:
    """What the rows of `run` add to the relevance, shape (sample, column)."""
    store = Gradients(job.gradients)
    scorer = Scorer(tests, segments_of(store.layout), store.layout.n_features, job.plan.reading.features)
    averages = job.averages()
    total: Floats = np.zeros((job.n_samples, tests.n_tests if averages is None else averages.shape[1]), np.float32)
    for rows in _rows_of(store, job, run, weights):
        found = scorer(rows.read, rows.weight)
        add_by_sample(total, rows.samples, found if averages is None else found @ averages)
        count_rows(len(rows.samples))
    return total


@dataclass(frozen=True)
class _Folded:
    """What is summed by sample: hypergradients of what can be folded, scores of the rest, shape (sample, column) or None."""

    sums: Floats
    scores: Floats | None


def _fold_run(job: Job, run: Span, samples: Span, tests: TestBlock | None, weights: StepWeights, count_rows: CountRows) -> _Folded:
    """What the rows of `run` add to the hypergradients of `samples`."""
    store = Gradients(job.gradients)
    segments, n_features, at_once = segments_of(store.layout), store.layout.n_features, job.plan.reading.features
    n_samples = samples[1] - samples[0]
    folder = Folder([s for s in segments if isinstance(s, DenseSegment)], n_samples, n_features, at_once)
    scorer = scores = None
    averages = job.averages()
    if tests is not None:
        scorer = Scorer(tests, [s for s in segments if not isinstance(s, DenseSegment)], n_features, at_once)
        scores = np.zeros((n_samples, tests.n_tests if averages is None else averages.shape[1]), np.float32)
    # once is enough: what is factored is kept row by row, whatever the samples
    keeper = FactoredKeeper(store, job.kept) if job.kept is not None and samples[0] == 0 else None
    for rows in _rows_of(store, job, run, weights):
        if keeper is not None:
            keeper.add(rows.rows, rows.read, rows.weight, rows.samples)
        places = rows.samples - samples[0]
        wanted = (places >= 0) & (places < n_samples)
        folder.add(rows.read, rows.weight, places, wanted)
        if scorer is not None and scores is not None:
            found = scorer(rows.read, rows.weight)
            found = found if averages is None else found @ averages
            add_by_sample(scores, places[wanted], found if wanted.all() else found[wanted])
        count_rows(len(places))
    return _Folded(folder.sums, scores)


def _merge(partials: list[_Folded]) -> _Folded:
    # a new array each time would be cleaner to look at and cost one more set of sums of memory
    first, *others = partials
    for more in others:
        np.add(first.sums, more.sums, out=first.sums)
        if first.scores is not None and more.scores is not None:
            np.add(first.scores, more.scores, out=first.scores)
    return first


def _answer(job: Job, first_sample: int, samples: Span, tests: Span, folded: _Folded) -> None:
    """Write the relevance of some samples for some test samples."""
    store = Gradients(job.gradients)
    segments = [s for s in segments_of(store.layout) if isinstance(s, DenseSegment)]
    values = folded_columns(_load_tests(job, tests).values, segments)
    averages = job.averages()
    if averages is not None:  # all test samples are one block then, and the columns are the groups
        values = averages.T @ values
        tests = (0, len(values))
    array = Array.open(job.relevance)
    if job.kept is not None and tests[0] == 0 and folded.sums.shape[1]:
        write_folded(job.kept, samples[0], folded.sums[samples[0] - first_sample : samples[1] - first_sample])
    for low in range(samples[0], samples[1], SAMPLE_MULTIPLE):
        own = slice(low - first_sample, min(low + SAMPLE_MULTIPLE, samples[1]) - first_sample)
        found = folded.sums[own] @ values.T
        if folded.scores is not None:
            found += folded.scores[own, slice(*tests)]
        write_relevance(array, low, tests[0], found)


def _done(answers: list[None]) -> None:
    """Where the answers of a pass come together."""


def _write(job: Job, tests: Span, partials: list[Floats]) -> None:
    total = partials[0]
    for more in partials[1:]:
        np.add(total, more, out=total)
    write_relevance(Array.open(job.relevance), 0, tests[0] if job.groups is None else 0, total)
