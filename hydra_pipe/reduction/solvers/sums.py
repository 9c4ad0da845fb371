"""Weighted sums over stored rows, as a Dask graph for each pass.

R(i, j) = sum_t w(t) <r(i, t), h_j> (docs/methods.md), in one of the orders of `plan/sums.py`. The
weights w(t) are in `weights.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
from dask.delayed import Delayed, delayed
from numpy.typing import NDArray

from hydra_pipe.maths.ranking import Ranking
from hydra_pipe.plan.records import SAMPLE_MULTIPLE, Answered, ReductionInput
from hydra_pipe.plan.sums import (
    FOLD_FIRST,
    FROM_HYPERGRADIENTS,
    SCORE_FIRST,
    SumInput,
    SumPlan,
    parse_chunks,
    plan_sums,
)
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.answers import Answers, finish
from hydra_pipe.reduction.blas import single_threaded_blas
from hydra_pipe.reduction.column_groups import DenseSegment, dense_segments, segments_of
from hydra_pipe.reduction.executors.base import CountRows, Workers
from hydra_pipe.reduction.job import (
    Held,
    ReductionJob,
    held_last_rows,
    held_tests,
    held_weights,
    load_tests,
    rows_of,
)
from hydra_pipe.reduction.keeping import FactoredKeeper
from hydra_pipe.reduction.kernels import add_rows
from hydra_pipe.reduction.norms import SquaredNorms, inverse_norms
from hydra_pipe.reduction.request import ReductionRequest
from hydra_pipe.reduction.resume import ANSWERED, mark, marked
from hydra_pipe.reduction.row_sums import Folder, folded_columns
from hydra_pipe.reduction.scores import Scorer, TestBlock
from hydra_pipe.reduction.solvers.base import Course, Units
from hydra_pipe.reduction.solvers.result import ReadingSolver
from hydra_pipe.reduction.weights import StepWeights, checkpoint_of_steps
from hydra_pipe.store.data.hypergradients import Hypergradients, create_hypergradients, write_folded
from hydra_pipe.store.data.probes import WhichTests
from hydra_pipe.store.data.relevance import write_relevance
from hydra_pipe.store.data.rows import check_within
from hydra_pipe.store.files import remove_partials, sync_tree, tree_bytes
from hydra_pipe.store.run.stage_runner import Work
from hydra_pipe.store.run.stages import StageId
from hydra_pipe.store.zarr.arrays import Array
from hydra_pipe.types import F32, Span

# Sums of rows by sample, which is the first dimension of every array. Score first: the scores. Fold
# first: hypergradients of the blocks that can be folded, then scores of the other blocks if any.
Sums = tuple[F32, ...]
# fact of an interrupted reduction: True if it kept hypergradients too
_KEEPING = "keeping"


class WeightedSums(ReadingSolver[SumPlan]):
    """Solver by sums of weighted rows. On request the sums by sample are kept on the way."""

    def __init__(self, request: ReductionRequest) -> None:
        super().__init__(request)
        self._keeping = request.options.keep_hypergradients

    @property
    def stages(self) -> tuple[StageId, ...]:
        """See `Solver`. Kept hypergradients have one store, independent of the result's name."""
        return (*super().stages, self.request.keep_stage) if self._keeping else super().stages

    # ------------------------------------------------------------------ planning

    def given(self, workers: Workers) -> SumInput:
        """See `CommonSolver`."""
        request = self.request
        return SumInput(
            **vars(super().given(workers)),
            keeping=self._keeping,
            kept=request.has_kept,
            # folds answer some samples for all tests, and top samples are found among all samples
            folds=request.last is None
            and len(request.checkpoints) == 1
            and request.options.top is None,
            norms=request.method.rows.cosine,
            checkpoints=len(request.checkpoints),
        )

    def plan(self, given: ReductionInput, after: Answered | None) -> SumPlan:
        """See `CommonSolver`."""
        assert isinstance(given, SumInput)
        return plan_sums(given, parse_chunks(self.request.options.chunks), after)

    def units(self, given: ReductionInput, plan: SumPlan) -> Units:
        """See `Solver`. In kept hypergradients only factored blocks have rows."""
        n_rows = given.n_read if not self.request.has_kept or given.n_factored else 0
        return Units(n_rows, n_rows * plan.passes, "rows")

    # ------------------------------------------------------------------ going on

    def has_work(self) -> bool:
        """See `Solver`."""
        return super().has_work() or any(
            self.directory.has_work(stage, {}) for stage in self.stages[1:]
        )

    def answered(self) -> Answered | None:
        """See `Solver`. If hypergradients are to be kept, only work that kept them counts."""
        found = marked(self.directory.stages.get(self.stages[0]))
        return (
            None
            if self._keeping and (found is None or not found[1].get(_KEEPING))
            else super().answered()
        )

    def most(self, answered: Answered) -> int:
        """See `ResultSolver`."""
        return self.request.n_samples if answered.order == FOLD_FIRST else super().most(answered)

    def say_before(self, course: Course[SumPlan], progress: Progress) -> None:
        """See `Solver`."""
        super().say_before(course, progress)
        method = self.request.method
        if method.on_the_way and len(self.request.checkpoints) == 1:
            progress.say(
                f"{method.name} uses the test gradients at the end for all steps; TracIn itself "
                "needs test gradients on the way: record with --test-every epoch"
            )

    def noun_of(self, plan: SumPlan) -> str:
        """See `ResultSolver`."""
        return plan.noun

    def clean(self) -> None:
        """See `Solver`."""
        super().clean()
        if self._keeping:
            remove_partials(self.request.kept)

    # ------------------------------------------------------------------ doing

    def claim(self) -> None:
        """Claim the stage of kept hypergradients, which are kept anew.

        Hypergradients of interrupted reductions are gone, so these reductions lose their progress.
        """
        if not self._keeping:
            return
        directory = self.directory
        for name, stage in directory.stages.items():
            if isinstance(found := stage.facts.get(ANSWERED), dict) and found.get(_KEEPING):
                del stage.facts[ANSWERED]
                directory.save(name)
        directory.begin(self.request.keep_stage, {})

    def create(self, course: Course[SumPlan]) -> None:
        """See `Solver`."""
        super().create(course)
        if self._keeping:
            create_hypergradients(self.request.kept, self.gradients, self.request.n_samples)

    def passes(
        self, course: Course[SumPlan], count_rows: CountRows
    ) -> Iterator[tuple[Span, Delayed]]:
        """See `Solver`."""
        kept = self.request.kept if self._keeping or self.request.has_kept else None
        return graphs(self.job(course.plan, course.given, kept), count_rows)

    def mark(self, answered: Answered) -> None:
        """See `Solver`."""
        sync_tree(self.target, files=False)
        if self._keeping:
            sync_tree(self.request.kept, files=False)
        mark(self.directory, self.stages[0], answered, **{_KEEPING: self._keeping})

    def conclude(self) -> None:
        """See `Solver`."""
        for stage in self.stages[1:]:
            Work(self.directory, stage, {"n_bytes": tree_bytes(self.request.kept)}).complete()


class SquaredSums(WeightedSums):
    """Sums of squared norms of rows: the relevance of each training sample for itself."""

    def given(self, workers: Workers) -> SumInput:
        """See `CommonSolver`."""
        return replace(super().given(workers), folds=False, norms=True)

    def passes(
        self, course: Course[SumPlan], count_rows: CountRows
    ) -> Iterator[tuple[Span, Delayed]]:
        """See `Solver`."""
        return graphs(self.job(course.plan, course.given), count_rows, _square_run)


def check_sums(request: ReductionRequest) -> None:
    """Check kept sums against the recording. Raises: StoreError."""
    Hypergradients(request.kept, request.gradients).check(request.gradients, request.n_samples)


def graphs(
    job: ReductionJob[SumPlan], count_rows: CountRows, score: "Callable[..., Sums] | None" = None
) -> Iterator[tuple[Span, Delayed]]:
    """Yield the passes in order: the span that each answers, and its graph.

    A span is one of training samples if rows are folded first, else one of test samples. Tasks read
    from the store themselves. Only sums by sample go from one task to another.

    Args:
        job: description of the reduction.
        count_rows: function called with the number of rows that have been done.
        score: function that scores a run of rows, if rows are scored first. None: the product with
            test gradients.
    """
    passes = {
        SCORE_FIRST: partial(_pass_of_tests, job, score or _score_run, _write),
        FOLD_FIRST: partial(_folding_pass, job),
        FROM_HYPERGRADIENTS: partial(_pass_of_tests, job, _score_kept, _answer_kept),
    }
    for block in job.plan.blocks:
        yield block, passes[job.plan.order](block, count_rows)


def _pass_of_tests(
    job: ReductionJob[SumPlan],
    score: Callable[..., Sums],
    answer: Callable[..., Ranking | None],
    tests: Span,
    count_rows: CountRows,
) -> Delayed:
    """Build the graph of a pass for `tests`: score runs of rows, total the scores, write them."""
    scoring, answering = delayed(score), delayed(answer)
    partials = [scoring(job, run, tests, count_rows) for run in job.plan.row_runs]
    totals = _totals(job, partials, (0, job.n_samples))
    answers = [answering(job, share, tests, sums) for share, sums in totals]
    result: Delayed = delayed(finish)(job, _first_column(job, tests), answers)
    return result


def _folding_pass(job: ReductionJob[SumPlan], samples: Span, count_rows: CountRows) -> Delayed:
    fold, answer = delayed(_fold_run), delayed(_answer)
    partials = [fold(job, run, samples, count_rows) for run in job.plan.row_runs]
    answers = [answer(job, share, sums) for share, sums in _totals(job, partials, samples)]
    result: Delayed = delayed(finish)(job, 0, answers)
    return result


def _totals(
    job: ReductionJob[SumPlan], partials: list[Delayed], samples: Span
) -> Iterator[tuple[Span, Delayed]]:
    """Yield shares of `samples`, each with the total of its partial sums.

    There are as many shares as workers. Each worker totals one share and answers it, so every
    partial sum leaves its process at most once. All sums that are added at once must be in one
    process. So few are added at once if the shares are large.
    """
    share, add = delayed(_share), delayed(_add)
    # shares of whole chunks of the relevance array
    n_chunks = -(-(samples[1] - samples[0]) // SAMPLE_MULTIPLE)
    n_shares = min(len(partials), n_chunks)
    bounds = [samples[0] + i * n_chunks // n_shares * SAMPLE_MULTIPLE for i in range(n_shares)] + [
        samples[1]
    ]
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


@single_threaded_blas
def _score_run(job: ReductionJob[SumPlan], run: Span, tests: Span, count_rows: CountRows) -> Sums:
    """Return the sums that the rows of `run` add to the relevance for `tests`.

    The array has shape (sample, column), float32.
    """
    store, averages = job.store(), job.averages()
    segments, n_features, at_once = (
        segments_of(store.layout),
        store.layout.n_features,
        job.plan.reading.features,
    )
    norms = SquaredNorms(segments, n_features, at_once, job.preconditioner(store))
    n_columns = tests[1] - tests[0] if averages is None else averages.shape[1]
    total: F32 = np.zeros((job.n_samples, n_columns), np.float32)
    scorer, present = None, job.tested
    with (
        held_weights(job, store) as weights,
        held_last_rows(job, store) if job.rows.last else nullcontext() as last,
        ExitStack() as held,
        closing(rows_of(store, job, run, weights, last)) as pieces,
    ):
        for rows in pieces:
            for own, tested in _by_checkpoint(job, rows):
                if scorer is None or present != tested:
                    # dropped before the next ones are loaded: a worker has room for one checkpoint
                    scorer = None
                    held.close()
                    block = held.enter_context(held_tests(job, tests, tested))
                    scorer, present = Scorer(block, segments, n_features, at_once), tested
                    del block
                weight = own.weight
                if job.rows.cosine:
                    weight = (
                        weight
                        * inverse_norms(norms(own.read, weight.astype(np.float64) ** 2))[:, None]
                    )
                _add_scores(total, own.samples, scorer(own.read, weight), averages)
            count_rows(rows.n_read)
    return (total,)


def _by_checkpoint(job: ReductionJob[SumPlan], rows: Held) -> Iterator[tuple[Held, WhichTests]]:
    """Split `rows` by the test gradients that they are multiplied with.

    The rows are of one part, so they are in order of step.
    """
    if len(job.checkpoints) < 2:
        yield rows, job.tested
        return
    used = checkpoint_of_steps(np.array(job.checkpoints), rows.steps)
    bounds = [0, *(np.flatnonzero(np.diff(used)) + 1), len(used)]
    for low, high in pairwise(bounds):
        yield (
            rows if high - low == len(used) else rows.only(slice(low, high)),
            WhichTests(job.checkpoints[used[low]]),
        )


@single_threaded_blas
def _square_run(job: ReductionJob[SumPlan], run: Span, tests: Span, count_rows: CountRows) -> Sums:
    """Return the sums that the rows of `run` add to each sample's relevance for itself.

    The array has shape (sample, 1), float32.
    """
    store = job.store()
    norms = SquaredNorms(
        segments_of(store.layout),
        store.layout.n_features,
        job.plan.reading.features,
        job.preconditioner(store),
    )
    total: F32 = np.zeros((job.n_samples, tests[1] - tests[0]), np.float32)
    with (
        held_weights(job, store) as weights,
        closing(
            rows_of(store, job, run, StepWeights(np.ones_like(weights.values), weights.series))
        ) as pieces,
    ):
        for rows in pieces:
            # a square is weighted by the step's weight times the squared scale of the row; the
            # squared scale may be too small for float32
            weight = (
                weights.values[np.ix_(rows.steps, weights.series)]
                * rows.weight.astype(np.float64) ** 2
            )
            add_rows(norms(rows.read, weight).astype(np.float32)[:, None], rows.samples, total)
            count_rows(rows.n_read)
    return (total,)


def _add_scores(total: F32, places: NDArray[np.int64], scores: F32, averages: F32 | None) -> None:
    """Add the scores of rows to the totals of their samples.

    Args:
        total: sums to add to, shape (sample, column), changed in place.
        places: place of each row in `total`, shape (row,). Rows with a negative place are left out.
        scores: scores of the rows, shape (row, test).
        averages: averages of test samples, shape (test, column). None: each test is a column.
    """
    add_rows(scores if averages is None else scores @ averages, places, total)


def _no_scores(n_samples: int, tests: TestBlock, averages: F32 | None) -> F32:
    """Return zeros to add scores to, shape (sample, column), float32."""
    return np.zeros(
        (n_samples, tests.n_tests if averages is None else averages.shape[1]), np.float32
    )


@single_threaded_blas
def _fold_run(job: ReductionJob[SumPlan], run: Span, samples: Span, count_rows: CountRows) -> Sums:
    """Return the sums that the rows of `run` add to the hypergradients of `samples`.

    If there are blocks that cannot be folded, their scores follow.
    """
    store, averages = job.store(), job.averages()
    segments, n_features, at_once = (
        segments_of(store.layout),
        store.layout.n_features,
        job.plan.reading.features,
    )
    n_samples = samples[1] - samples[0]
    factored = [s for s in segments if not isinstance(s, DenseSegment)]
    folder = Folder(
        [s for s in segments if isinstance(s, DenseSegment)], n_samples, n_features, at_once
    )
    scorer = scores = None
    # the first pass keeps the factored columns of all rows, independent of its samples
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
def _answer(job: ReductionJob[SumPlan], samples: Span, sums: Sums) -> None:
    """Write the relevance of some samples for every test sample.

    Also writes their hypergradients if these are to be kept.
    """
    folded, *scores = sums
    segments = dense_segments(job.store().layout)
    array, averages = Array.open(job.relevance), job.averages()
    if job.kept is not None and folded.shape[1]:
        write_folded(job.kept, samples[0], folded)
    for tests in job.plan.test_blocks:
        values = folded_columns(load_tests(job, tests, job.tested).values, segments)
        columns = slice(*tests)
        # with averages, all test samples are one block, and the columns are the groups
        if averages is not None:
            values = averages.T @ values
            columns = slice(0, len(values))
        for low in range(0, samples[1] - samples[0], SAMPLE_MULTIPLE):
            own = slice(low, low + SAMPLE_MULTIPLE)
            found = folded[own] @ values.T
            for scored in scores:
                found += scored[own, columns]
            write_relevance(array, samples[0] + low, columns.start, found)


@single_threaded_blas
def _score_kept(job: ReductionJob[SumPlan], run: Span, tests: Span, count_rows: CountRows) -> Sums:
    """Return the sums that factored rows of `run` add to the relevance for `tests`.

    The array has shape (sample, column), float32.
    """
    kept, averages = _open_kept(job), job.averages()
    with held_tests(job, tests) as block:
        total = _no_scores(job.n_samples, block, averages)
        if kept.rows is None:
            return (total,)
        own = TestBlock(
            np.ascontiguousarray(block.values[:, kept.columns]), block.scale[:, kept.blocks]
        )
        scorer = Scorer(own, segments_of(kept.layout), len(kept.columns), len(kept.columns))
        with closing(kept.rows.stream(run, job.plan.reading.rows)) as pieces:
            for piece in pieces:
                found, samples = (
                    scorer(piece.read, kept.rows.scales(piece.rows)),
                    kept.samples(piece.rows),
                )
                check_within(samples, job.n_samples, f"samples of {kept.path}")
                _add_scores(total, samples, found, averages)
                count_rows(len(found))
    return (total,)


@single_threaded_blas
def _answer_kept(
    job: ReductionJob[SumPlan], samples: Span, tests: Span, sums: Sums
) -> Ranking | None:
    """Answer some samples for some test samples, from kept hypergradients.

    The relevance is the scores of factored rows plus the products of the kept sums.
    """
    kept, (total,) = _open_kept(job), sums
    answers = Answers(job, _first_column(job, tests), total.shape[1])
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
        answers.add(low, found)
    return answers.ranking


def _open_kept(job: ReductionJob[SumPlan]) -> Hypergradients:
    assert job.kept is not None
    return Hypergradients(job.kept, job.store())


def _write(job: ReductionJob[SumPlan], samples: Span, tests: Span, sums: Sums) -> Ranking | None:
    """Answer some samples for some test samples."""
    answers = Answers(job, _first_column(job, tests), sums[0].shape[1])
    answers.add(samples[0], sums[0])
    return answers.ranking


def _first_column(job: ReductionJob[SumPlan], tests: Span) -> int:
    """Return the first column of the result that some test samples answer."""
    return tests[0] if job.groups is None else 0
