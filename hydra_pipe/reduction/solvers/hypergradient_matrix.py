"""The matrix of hypergradients H, shape (sample, feature).

Either every feature is swept backward as a test gradient, or every training sample is swept
forward. Both give H. Any test sample is then answered by R = H h (`from_matrix.py`). The matrix is
a stage of its own. It is filled in blocks of features or of samples, in the same way as relevance
is filled in blocks of columns.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from dask.delayed import Delayed

from hydra_pipe.errors import BudgetError
from hydra_pipe.maths.fisher import FORMS
from hydra_pipe.plan.basis_sweep import default_rank
from hydra_pipe.plan.hypergradient_matrix import ALONG, FEATURES, SAMPLES, MatrixPlan, plan_matrix
from hydra_pipe.plan.records import Answered, ReductionInput
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.executors import executor_of
from hydra_pipe.reduction.executors.base import CountRows
from hydra_pipe.reduction.forward import ForwardSweep
from hydra_pipe.reduction.job import ReductionJob
from hydra_pipe.reduction.materialize import Expansion, feature_spans
from hydra_pipe.reduction.request import ReductionRequest
from hydra_pipe.reduction.resume import mark, marked
from hydra_pipe.reduction.solvers.base import Course, Solver
from hydra_pipe.reduction.solvers.basis_sweep import BasisSweep
from hydra_pipe.reduction.solvers.common import CommonSolver
from hydra_pipe.reduction.solvers.from_matrix import FromMatrix
from hydra_pipe.reduction.solvers.sweep import (
    Direction,
    OverFeatures,
    Running,
    Sweep,
    course_of,
    expansion_of,
    graphs,
    sweep_input,
)
from hydra_pipe.reduction.steps import StepRows, forward
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.hypergradients import create_matrix
from hydra_pipe.store.data.relevance import write_relevance
from hydra_pipe.store.data.sweep_state import remove_states
from hydra_pipe.store.disk_space import free_bytes, room_for
from hydra_pipe.store.files import remove_partials, sync_tree, tree_bytes
from hydra_pipe.store.run.permission import check_stages
from hydra_pipe.store.run.results import FULL
from hydra_pipe.store.run.stages import StageId
from hydra_pipe.store.zarr.arrays import Array
from hydra_pipe.streams import Stream
from hydra_pipe.types import F32, I64, Span
from hydra_pipe.units import format_bytes, format_seconds


def fisher_solvers(request: ReductionRequest) -> list[Solver]:
    """Return the solvers of `hydra-fisher`.

    They sweep the test gradients, in a basis or over all features, or answer from a kept matrix.
    With `--keep-hypergradients` they fill the matrix and then answer from it.
    """
    if not request.options.keep_hypergradients:
        return [FromMatrix(request) if request.has_kept else _sweep(request)]
    options = replace(request.options, keep_hypergradients=False)
    # an executor is entered once
    later = replace(request, options=options, scheduler=executor_of(options.scheduler))
    return [HypergradientMatrix(request), FromMatrix(later)]


def _sweep(request: ReductionRequest) -> Solver:
    """Return the sweep over all features, or in a basis if that has fewer columns."""
    rank, width = request.options.rank, request.gradients.layout.whole_width
    if rank is None:
        rank = default_rank(request.gradients.rows.n_rows, width) or FULL
    return Sweep(request) if rank == FULL or rank >= width else BasisSweep(request, rank)


class HypergradientMatrix(CommonSolver[MatrixPlan]):
    """Solver that fills the matrix of hypergradients."""

    doing = "keep hypergradients"

    @property
    def stages(self) -> tuple[StageId, ...]:
        """See `Solver`."""
        return (self.request.keep_stage,)

    @property
    def target(self) -> Path:
        """Path of the matrix."""
        return self.request.kept / names.SWEPT

    @property
    def _shape(self) -> tuple[int, int]:
        return self.request.n_samples, self.gradients.layout.whole_width

    def has_work(self) -> bool:
        """See `Solver`."""
        return self.directory.has_work(self.stages[0], {})

    # ------------------------------------------------------------------ planning and going on

    def plan(self, given: ReductionInput, after: Answered | None) -> MatrixPlan:
        """See `CommonSolver`."""
        return plan_matrix(sweep_input(self.request, given), after)

    def answered(self) -> Answered | None:
        """See `Solver`."""
        found = marked(self.directory.stages.get(self.stages[0]))
        if found is None or found[0].order not in ALONG:
            return None
        return found[0] if found[0].done <= self._shape[ALONG[found[0].order]] else None

    def fits(self, plan: MatrixPlan) -> bool:
        """See `CommonSolver`."""
        array = Array.open(self.target)
        return array.shape == self._shape and array.shards is None and plan.fills(array.chunks)

    # ------------------------------------------------------------------ doing

    def check_room(self, course: Course[MatrixPlan], progress: Progress) -> None:
        """See `Solver`. A matrix that does not fit is refused."""
        free = free_bytes(self.directory.path)
        if free is None:
            return
        n_samples, width = self._shape
        plan, done = course.whole, 0 if course.after is None else course.after.done
        # two saved states of each sweep: the old one stays until the new one is written
        states = 2 * plan.workers * plan.width * (2 * len(FORMS) * width + n_samples) * 4
        needed = plan.written_bytes * (plan.n_columns - done) // plan.n_columns + states
        if not done and self.request.kept.exists():
            free += tree_bytes(self.request.kept)  # removed before the new matrix is created
        if needed > free:
            raise BudgetError(
                f"keeping {self._size(plan)}, and {format_bytes(states)} on the way, needs "
                f"{format_bytes(needed)} on the disk, "
                f"{format_bytes(free)} are free at {self.directory.path}: make room, leave out "
                "--keep-hypergradients, or record "
                f"with --encoding projected and a lower --dim, which is the number of features"
            )

    def create(self, course: Course[MatrixPlan]) -> None:
        """See `Solver`."""
        check_stages(self.directory.path, self.stages[0])
        self.directory.begin(self.stages[0], {})
        spans = feature_spans(self.gradients.layout)
        create_matrix(
            self.request.kept, self.directory.run_id, self._shape, course.plan.chunks, spans
        )
        self.mark(Answered(course.plan.order, 0, course.given.base_bytes))

    def mark(self, answered: Answered) -> None:
        """See `Solver`."""
        sync_tree(self.request.kept, files=False)
        mark(self.directory, self.stages[0], answered)

    def clean(self) -> None:
        """See `Solver`."""
        remove_partials(self.request.kept)

    def passes(
        self, course: Course[MatrixPlan], count_rows: CountRows
    ) -> Iterator[tuple[Span, Delayed]]:
        """See `Solver`. A pass finds the share of the curvature that saturation left."""
        directions: dict[int, Direction[Any]] = {SAMPLES: FromSamples(), FEATURES: FromFeatures()}
        return graphs(
            self.job(course.plan, course.given), directions[course.plan.along], count_rows
        )

    def conclude(self) -> None:
        """See `Solver`. Remove states of column blocks that an earlier budget had planned."""
        remove_states(self.target)

    def facts(self, given: ReductionInput) -> dict[str, Any]:
        """See `Solver`."""
        return {"n_bytes": tree_bytes(self.request.kept)}

    # ------------------------------------------------------------------ words

    def say_before(self, course: Course[MatrixPlan], progress: Progress) -> None:
        """See `Solver`."""
        plan = course.plan
        if course.after is not None:
            progress.say(f"resuming after {course.after.done:,} of {plan.n_columns:,} {plan.noun}")

    def summary(self, course: Course[MatrixPlan]) -> str:
        """See `Solver`."""
        plan = course.whole
        return (
            f"keeping {self._size(plan)}: {plan.order}, {plan.passes:,} "
            f"pass{'es' if plan.passes > 1 else ''} of "
            f"{plan.workers} workers, {plan.width:,} {plan.noun} each, at most "
            f"{format_bytes(plan.peak_bytes)} of memory, "
            f"about {_lasting(plan)}"
        )

    def describe(self, course: Course[MatrixPlan]) -> dict[str, str]:
        """See `Solver`."""
        if not self.has_work():
            return {"hypergradients": "are kept already"}
        after = self.answered()
        begun = after if after is not None and after.order == course.plan.order else None
        self.check_room(replace(course, after=begun), Progress())
        given, plan = course.given, course.plan
        n_samples, width = self._shape
        return {
            "hypergradients": f"{n_samples:,} samples x {width:,} features",
            "order": f"{plan.order}, with {plan.n_columns:,} {plan.noun} as columns",
            "passes": (
                f"{plan.passes:,}, of {plan.width:,} {plan.noun} for each of {plan.workers} workers"
            ),
            "read": f"{format_bytes(plan.read_bytes)} decoded",
            "written": f"{self._size(plan)}: {room_for(plan.written_bytes, self.directory.path)}",
            "operations": f"{plan.operations:,} of matrix products",
            "peak memory": (
                f"at most {format_bytes(plan.peak_bytes)}, of {format_bytes(given.memory_bytes)}"
            )
            + (" in each process" if given.processes else ""),
            "time": f"about {_lasting(plan)} where benchmarks/RESULTS.md was measured",
        }

    def _size(self, plan: MatrixPlan) -> str:
        n_samples, width = self._shape
        return (
            f"{n_samples:,} samples x {width:,} features x 4 bytes = "
            f"{format_bytes(plan.written_bytes)}"
        )


def _lasting(plan: MatrixPlan) -> str:
    return format_seconds(plan.lasting_picoseconds / 1e12)


class FromFeatures(OverFeatures):
    """Backward sweep that begins with unit vectors of features. It fills columns of the matrix."""

    def starts(
        self, job: ReductionJob[Any], store: Gradients, expansion: Expansion, columns: Span
    ) -> F32:
        """See `OverFeatures`."""
        found: F32 = np.zeros((columns[1] - columns[0], expansion.width), np.float32)
        found[np.arange(len(found)), np.arange(*columns)] = 1
        return found


class FromSamples(Direction[ForwardSweep]):
    """Forward sweep of the changes by each sample's weight. It fills lines of the matrix."""

    def begin(
        self, job: ReductionJob[Any], store: Gradients, columns: Span
    ) -> Running[ForwardSweep]:
        """See `Direction`."""
        expansion = expansion_of(job, store)
        course = course_of(store, expansion)
        return Running(ForwardSweep(columns, expansion.width, *course), expansion)

    def taken(self, rows_of_steps: I64, n_steps: int) -> I64:
        """See `Direction`."""
        return rows_of_steps[:n_steps]

    def steps(self, store: Gradients, n_taken: int, rows_at_once: int) -> Stream[StepRows]:
        """See `Direction`."""
        return forward(store, n_taken, rows_at_once)

    def write(self, job: ReductionJob[Any], columns: Span, sweep: ForwardSweep) -> None:
        """See `Direction`."""
        sweep.finish()
        array = Array.open(job.relevance)
        width = array.chunks[1]
        for left in range(0, array.shape[1], width):
            features = slice(left, min(left + width, array.shape[1]))
            write_relevance(array, columns[0], left, np.negative(sweep.changes(features)))
