"""The sweep of test gradients, out of core: a task for each block of columns.

Each task reads the recording from its end. `reduction/sweep.py` has the computation. This module
feeds rows to it, saves its state from time to time, and writes its result.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from dask.delayed import Delayed, delayed
from numpy.typing import NDArray

from hydra_pipe.maths.schedule import Schedule
from hydra_pipe.plan.records import RANKED_SAMPLES, Answered, Found, ReductionInput
from hydra_pipe.plan.sums import parse_chunks
from hydra_pipe.plan.sweep import SweepInput, SweepPlan, plan_sweep
from hydra_pipe.reduction.answers import Answers, finish
from hydra_pipe.reduction.blas import single_threaded_blas
from hydra_pipe.reduction.executors.base import CountRows
from hydra_pipe.reduction.job import ReductionJob, columns_of_tests
from hydra_pipe.reduction.kernels import Workspace
from hydra_pipe.reduction.materialize import Expansion
from hydra_pipe.reduction.request import ReductionRequest
from hydra_pipe.reduction.solvers.base import Course
from hydra_pipe.reduction.solvers.result import ReadingSolver
from hydra_pipe.reduction.steps import StepRows, backward
from hydra_pipe.reduction.sweep import Recursion
from hydra_pipe.reduction.sweep import Span as SeriesSpan
from hydra_pipe.reduction.sweep import Sweep as BackwardSweep
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.rows import check_within
from hydra_pipe.store.data.save_interval import SaveInterval
from hydra_pipe.store.data.sweep_state import load_state, remove_state, remove_states, save_state
from hydra_pipe.store.json_parsing import is_count
from hydra_pipe.streams import Stream
from hydra_pipe.types import F32, I64, Span

R = TypeVar("R", bound=Recursion)


class Sweep(ReadingSolver[SweepPlan]):
    """Solver that computes relevance by a backward sweep of each column."""

    divided_by_memory = True

    def plan(self, given: ReductionInput, after: Answered | None) -> SweepPlan:
        """See `CommonSolver`."""
        return plan_sweep(sweep_input(self.request, given), 0 if after is None else after.done)

    def most(self, answered: Answered) -> int:
        """See `ResultSolver`."""
        return self.request.columns.n_columns

    def passes(
        self, course: Course[SweepPlan], count_rows: CountRows
    ) -> Iterator[tuple[Span, Delayed]]:
        """See `Solver`. A pass finds the share of the curvature that saturation left."""
        return graphs(self.job(course.plan, course.given), FromTests(), count_rows)

    def conclude(self) -> None:
        """See `Solver`. Remove states of column blocks that an earlier budget had planned."""
        remove_states(self.target)


def sweep_input(request: ReductionRequest, given: ReductionInput) -> SweepInput:
    """Return the sizes of a sweep of the columns of a request."""
    most_rows = int(request.gradients.rows_of_steps()[1].sum(axis=1).max(initial=0))
    chunks = parse_chunks(request.options.chunks)
    # whole rows, in whole stored chunks and at most a file at once
    asked = given.shard_rows if chunks is None else chunks[0]
    decoded = min(-(-asked // given.chunk_rows) * given.chunk_rows, given.shard_rows)
    return SweepInput(
        given,
        request.gradients.layout.whole_width,
        decoded,
        most_rows,
        given.n_samples,
        preconditioned=request.gradients.preconditioned,
    )


class Running(Generic[R]):
    """A sweep in its course, which takes rows with all their features.

    Args:
        sweep: the sweep.
        expansion: features of the rows.
    """

    def __init__(self, sweep: R, expansion: Expansion) -> None:
        self.sweep, self._expansion = sweep, expansion
        self._workspace = Workspace()

    def take(self, rows: StepRows, weight: F32, count: F32) -> None:
        """Take a step.

        Args:
            rows: rows of the step.
            weight: scale of each block in each row, times that of the step, shape (row, block).
            count: n / c of each row, shape (row,). See `Recursion.step`.
        """
        out = self._workspace.matrix(len(rows.sample), self._expansion.width)
        self._expansion.expand(rows.stored, weight, out)
        self.sweep.step(rows.step, out, count, rows.rho, rows.sample)

    def arrays(self) -> dict[str, F32]:
        """Return the arrays of the state by name."""
        return self.sweep.arrays()

    def restore(self, arrays: dict[str, F32]) -> None:
        """Resume from the arrays that `arrays` returned."""
        self.sweep.restore(arrays)


class Direction(ABC, Generic[R]):
    """Direction of a sweep: its start, its order of steps, and the result that it writes."""

    @abstractmethod
    def begin(self, job: ReductionJob[Any], store: Gradients, columns: Span) -> "Running[R]":
        """Return the sweep of some columns, before its first step."""

    @abstractmethod
    def taken(self, rows_of_steps: I64, n_steps: int) -> I64:
        """Return the numbers of rows of the first `n_steps` steps that a sweep takes.

        Args:
            rows_of_steps: number of rows of every step, shape (step,), int64.
            n_steps: number of steps that were taken.
        """

    @abstractmethod
    def steps(self, store: Gradients, n_taken: int, rows_at_once: int) -> Stream[StepRows]:
        """Stream the rows of the steps that are left, in the order of the sweep.

        Close the stream after use.
        """

    @abstractmethod
    def write(self, job: ReductionJob[Any], columns: Span, sweep: R) -> None:
        """Write the result of a finished sweep."""


class Backward(Direction[BackwardSweep]):
    """Direction from the last step to the first."""

    def taken(self, rows_of_steps: I64, n_steps: int) -> I64:
        """See `Direction`."""
        return rows_of_steps[len(rows_of_steps) - n_steps :]

    def steps(self, store: Gradients, n_taken: int, rows_at_once: int) -> Stream[StepRows]:
        """See `Direction`."""
        return backward(store, store.n_steps - n_taken, rows_at_once)

    def write(self, job: ReductionJob[Any], columns: Span, sweep: BackwardSweep) -> None:
        """See `Direction`."""
        answers = Answers(job, columns[0], columns[1] - columns[0])
        for low in range(0, job.n_samples, RANKED_SAMPLES):
            answers.add(low, np.negative(sweep.sums[low : low + RANKED_SAMPLES]))
        finish(job, columns[0], [answers.ranking])


class OverFeatures(Backward):
    """Backward sweep over all features. It begins with vectors of features."""

    @abstractmethod
    def starts(
        self, job: ReductionJob[Any], store: Gradients, expansion: Expansion, columns: Span
    ) -> F32:
        """Return the vectors that some columns begin with, shape (column, feature), float32."""

    def begin(
        self, job: ReductionJob[Any], store: Gradients, columns: Span
    ) -> Running[BackwardSweep]:
        """See `Direction`."""
        expansion = expansion_of(job, store)
        starts = self.starts(job, store, expansion, columns)
        course = course_of(store, expansion)
        return Running(BackwardSweep(starts, *course, job.n_samples), expansion)


class FromTests(OverFeatures):
    """Backward sweep that begins with test gradients or their means."""

    def starts(
        self, job: ReductionJob[Any], store: Gradients, expansion: Expansion, columns: Span
    ) -> F32:
        """See `OverFeatures`."""
        return columns_of_tests(store, job, expansion, columns)


def expansion_of(job: ReductionJob[Any], store: Gradients) -> Expansion:
    """Return the features of a sweep over all of them."""
    return Expansion(store.layout, job.preconditioner(store))


def course_of(store: Gradients, expansion: Expansion) -> tuple[Schedule, list[SeriesSpan]]:
    """Return the settings of every step, and the spans of features that follow each series."""
    schedule, series = store.schedules()
    return schedule, _merged(expansion, series)


def graphs(
    job: ReductionJob[SweepPlan], direction: Direction[Any] | Delayed, count_rows: CountRows
) -> Iterator[tuple[Span, Delayed]]:
    """Yield the passes in order: the columns that each answers, and its graph.

    The graph returns the share of the curvature that saturation left.

    Args:
        job: description of the reduction.
        direction: direction of the sweep, or the graph that computes it.
        count_rows: function that counts rows.
    """
    sweep, mean = delayed(sweep_columns), delayed(_mean)
    blocks, workers = job.plan.columns, job.plan.workers
    for start in range(0, len(blocks), workers):
        together = blocks[start : start + workers]
        # every task reads all rows, so only the first one counts them
        counters = [count_rows, *([partial(_heed, count_rows)] * (len(together) - 1))]
        shares = [
            sweep(job, direction, columns, count)
            for columns, count in zip(together, counters, strict=True)
        ]
        yield (together[0][0], together[-1][1]), mean(shares)


def _heed(count_rows: CountRows, _: int) -> None:
    """Count no rows, but let the counter raise, which ends the task."""
    count_rows(0)


def _mean(shares: list[float]) -> Found:
    return {names.CURVATURE_LEFT: sum(shares) / len(shares)}


@single_threaded_blas
def sweep_columns(
    job: ReductionJob[SweepPlan], direction: Direction[Any], columns: Span, count_rows: CountRows
) -> float:
    """Fill the block of the result that some columns of the direction answer.

    A sweep that was interrupted is resumed from its saved state.

    Returns:
        The share of the curvature that saturation left, mean over the steps.
    """
    store = job.store()
    running: Running[Any] = direction.begin(job, store, columns)
    sweep: Recursion = running.sweep
    _go_on(job, columns, running, store.n_steps)
    scales = store.step_table(names.GRADIENT_SCALE)
    pace, taken = SaveInterval(), sweep.n_steps
    if taken:
        count_rows(int(direction.taken(store.rows_of_steps()[1].sum(axis=1), taken).sum()))
    with closing(direction.steps(store, taken, job.plan.reading.rows)) as steps:
        for rows in steps:
            check_within(rows.sample, job.n_samples, f"samples of {store.path}")
            _step(running, rows, scales[rows.step])
            count_rows(len(rows.sample))
            if pace.due:
                with pace.keeping():
                    _keep(job, columns, running)
    direction.write(job, columns, sweep)
    remove_state(job.relevance, columns)
    return sweep.left / max(1, sweep.n_steps)


def _step(running: Running[Any], rows: StepRows, scale: float) -> None:
    # The curvature of the mean loss is the sum of n rho r r.T. The update followed c times the
    # gradient, so in terms of the rows c r the curvature is n rho / |c| (c r)(c r).T. An optimiser
    # that maximises has a c below 0, and follows the loss times -1, whose curvature this is.
    count = rows.count / np.float32(abs(scale)) if scale else np.zeros_like(rows.count)
    running.take(rows, rows.scale * np.float32(scale), count)


def _merged(expansion: Expansion, series: NDArray[np.int64]) -> list[SeriesSpan]:
    """Join neighbouring features that follow the same series into one span."""
    merged: list[SeriesSpan] = []
    for first, last, block in expansion.spans:
        own = int(series[block])
        if merged and merged[-1][2] == own:
            merged[-1] = (merged[-1][0], last, own)
        else:
            merged.append((first, last, own))
    return merged


def _keep(job: ReductionJob[Any], columns: Span, running: Running[Any]) -> None:
    sweep = running.sweep
    sweep.finish()
    state = {"taken": sweep.n_steps, "left": sweep.left}
    save_state(job.relevance, columns, state, running.arrays())


def _go_on(job: ReductionJob[Any], columns: Span, running: Running[Any], n_steps: int) -> None:
    """Restore the saved state of a sweep, if there is a valid one."""
    found = load_state(job.relevance, columns, running.arrays())
    if found is None:
        return
    state, arrays = found
    taken, left = state.get("taken"), state.get("left")
    if not is_count(taken) or taken > n_steps or not isinstance(left, int | float):
        return
    running.restore(arrays)
    running.sweep.n_steps, running.sweep.left = taken, float(left)
