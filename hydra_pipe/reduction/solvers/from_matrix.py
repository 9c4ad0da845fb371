"""Answers from the kept matrix of hypergradients: R = H h, a task for each share of the samples."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise

import numpy as np
from dask.delayed import Delayed, delayed

from hydra_pipe.errors import StoreError
from hydra_pipe.maths.ranking import Ranking
from hydra_pipe.plan.from_matrix import AnswerInput, FromMatrixPlan, plan_answers
from hydra_pipe.plan.records import SAMPLE_MULTIPLE, Answered, Found, ReductionInput
from hydra_pipe.reduction.answers import Answers, finish
from hydra_pipe.reduction.blas import single_threaded_blas
from hydra_pipe.reduction.executors.base import CountRows
from hydra_pipe.reduction.job import ReductionJob, columns_of_tests
from hydra_pipe.reduction.materialize import Expansion, feature_spans
from hydra_pipe.reduction.request import ReductionRequest
from hydra_pipe.reduction.sharing import shared
from hydra_pipe.reduction.solvers.base import Course, Units
from hydra_pipe.reduction.solvers.result import ReadingSolver
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.hypergradients import HYPERGRADIENTS_UNREADABLE, HypergradientMatrix
from hydra_pipe.store.run.stages import Stage
from hydra_pipe.types import F32, Span


class FromMatrix(ReadingSolver[FromMatrixPlan]):
    """Solver by the product of kept hypergradients and test gradients."""

    def plan(self, given: ReductionInput, after: Answered | None) -> FromMatrixPlan:
        """See `CommonSolver`."""
        return plan_answers(
            AnswerInput(given, self.gradients.layout.whole_width),
            0 if after is None else after.done,
        )

    def most(self, answered: Answered) -> int:
        """See `ResultSolver`."""
        return self.request.columns.n_columns

    def units(self, given: ReductionInput, plan: FromMatrixPlan) -> Units:
        """See `Solver`. Counts samples, because no rows are read."""
        return Units(given.n_samples, given.n_samples * plan.passes, "samples")

    def passes(
        self, course: Course[FromMatrixPlan], count_rows: CountRows
    ) -> Iterator[tuple[Span, Delayed]]:
        """See `Solver`."""
        job = self.job(course.plan, course.given, self.request.kept)
        answering, done = delayed(answer), delayed(finish)
        # shares of whole chunks of the relevance array
        n_chunks, n_shares = -(-job.n_samples // SAMPLE_MULTIPLE), course.plan.workers
        bounds = [i * n_chunks // n_shares * SAMPLE_MULTIPLE for i in range(n_shares)] + [
            job.n_samples
        ]
        for columns in course.plan.columns:
            yield (
                columns,
                done(
                    job,
                    columns[0],
                    [answering(job, samples, columns, count_rows) for samples in pairwise(bounds)],
                ),
            )

    def found_before(self) -> Found:
        """See `Solver`."""
        return left_of(self.directory.stages[self.request.keep_stage])

    def amount(self, given: ReductionInput) -> str:
        """See `ReadingSolver`."""
        return f"{given.n_samples:,} samples x {self.gradients.layout.whole_width:,} features"

    def sizes(self, given: ReductionInput) -> dict[str, str]:
        """See `ReadingSolver`."""
        return {"hypergradients": self.amount(given)}


def left_of(stage: Stage) -> Found:
    """Return the finding that a result takes over from its matrix: the share of curvature left."""
    left = stage.facts.get(names.CURVATURE_LEFT)
    return {names.CURVATURE_LEFT: left} if isinstance(left, float) else {}


def check_matrix(request: ReductionRequest) -> None:
    """Check a kept matrix against the recording. Raises: StoreError."""
    gradients = request.gradients
    kept = HypergradientMatrix(request.kept, gradients)
    kept.check(gradients, request.n_samples)
    if kept.spans != feature_spans(gradients.layout):
        raise StoreError(
            f"{kept.path} has other features than {gradients.path}: {HYPERGRADIENTS_UNREADABLE}"
        )


@single_threaded_blas
def answer(
    job: ReductionJob[FromMatrixPlan], samples: Span, columns: Span, count_rows: CountRows
) -> Ranking | None:
    """Answer some columns of the relevance of some samples."""
    assert job.kept is not None
    store = job.store()
    kept = HypergradientMatrix(job.kept, store)
    answers = Answers(job, columns[0], columns[1] - columns[0])
    with _held_columns(job, store, columns) as tests:
        for low in range(samples[0], samples[1], SAMPLE_MULTIPLE):
            own = slice(low, min(low + SAMPLE_MULTIPLE, samples[1]))
            found: F32 = np.zeros((own.stop - own.start, len(tests)), np.float32)
            for features in kept.tiles():
                found += kept.read(own, features) @ tests[:, features].T
            answers.add(low, found)
            count_rows(len(found))
    return answers.ranking


def _held_columns(
    job: ReductionJob[FromMatrixPlan], store: Gradients, columns: Span
) -> AbstractContextManager[F32]:
    """Return a context that holds test gradients or their means, multiplied out.

    The array has shape (column, feature), float32.
    """
    key = (
        "columns",
        job.gradients,
        job.tested,
        job.tests,
        None if job.groups is None else job.groups.tobytes(),
        columns,
    )

    def load() -> F32:
        expansion = Expansion(store.layout, job.preconditioner(store))
        return columns_of_tests(store, job, expansion, columns)

    return shared(key, load)
