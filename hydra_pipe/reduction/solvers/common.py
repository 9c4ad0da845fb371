"""Common base of all solvers of a request: sizes for plans, resuming, settings of tasks, words."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

from hydra_pipe.errors import StoreError
from hydra_pipe.plan.costs import base_bytes
from hydra_pipe.plan.rank_rows import shards_of
from hydra_pipe.plan.records import Answered, Found, Plan, ReductionInput
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.column_groups import dense_segments
from hydra_pipe.reduction.executors.base import Scheduler, Workers
from hydra_pipe.reduction.job import ReductionJob
from hydra_pipe.reduction.request import ReductionRequest
from hydra_pipe.reduction.resume import mark
from hydra_pipe.reduction.solvers.base import Course, Units
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.probes import WhichTests
from hydra_pipe.store.data.relevance import ResultColumns
from hydra_pipe.store.files import remove_partials, sync_tree
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import GROUPINGS
from hydra_pipe.store.run.stages import StageId
from hydra_pipe.units import parse_bytes

P = TypeVar("P", bound=Plan)
# The memory of a process varies a little from call to call. A resumed reduction must not be divided
# differently for this reason. The bounds leave more room than this (benchmarks/RESULTS.md).
_SAME_BASE_BYTES = 16 * 2**20


class CommonSolver(ABC, Generic[P]):
    """Solver of a request, with a plan of type `P`. See `Solver`.

    Args:
        request: the reduction that is asked for.
    """

    doing = "reduce"

    def __init__(self, request: ReductionRequest) -> None:
        self.request = request

    @property
    def directory(self) -> RunDirectory:
        return self.request.directory

    @property
    def gradients(self) -> Gradients:
        return self.request.gradients

    @property
    def scheduler(self) -> Scheduler:
        return self.request.scheduler

    @property
    @abstractmethod
    def stages(self) -> tuple[StageId, ...]:
        """See `Solver`."""

    @property
    @abstractmethod
    def target(self) -> Path:
        """Path of the array that is filled."""

    @abstractmethod
    def plan(self, given: ReductionInput, after: Answered | None) -> P:
        """Plan the work that is left after `after`. Raises: BudgetError."""

    @abstractmethod
    def fits(self, plan: P) -> bool:
        """Tell whether the existing array is the one to fill, and the plan fills its chunks.

        Raises:
            StoreError: the array cannot be opened.
        """

    # ------------------------------------------------------------------ planning

    def given(self, workers: Workers) -> ReductionInput:
        """Return the sizes that a plan is made from."""
        request, rows = self.request, self.gradients.rows
        memory_bytes = parse_bytes(request.options.memory)
        found = reduction_input(
            self.gradients,
            request.tested,
            request.n_samples,
            request.columns,
            memory_bytes,
            workers,
        )
        if request.options.top is not None:
            found = replace(found, top=min(request.options.top, request.n_samples))
        if request.last is None:
            return found
        return replace(
            found, shards=tuple(shards_of(request.last.tolist(), rows.part_rows, rows.shard_rows))
        )

    def _planned(self, given: ReductionInput, after: Answered | None) -> tuple[ReductionInput, P]:
        """Plan with the memory that was there at the start of the work, if it is about the same."""
        if after is not None and abs(after.base_bytes - given.base_bytes) <= _SAME_BASE_BYTES:
            given = replace(given, base_bytes=after.base_bytes)
        return given, self.plan(given, after)

    def course(self, workers: Workers, after: Answered | None) -> Course[P]:
        """See `Solver`."""
        here = self.given(workers)
        given, plan = self._planned(here, after)
        if after is not None and not self._goes_on(after, plan):
            after = None
            given, plan = self._planned(here, None)
        whole = plan if after is None else self._planned(here, replace(after, done=0))[1]
        return Course(after, given, plan, whole)

    def _goes_on(self, after: Answered, plan: P) -> bool:
        if plan.order != after.order:
            return False
        try:
            return self.fits(plan)
        except StoreError:
            return False

    # ------------------------------------------------------------------ doing

    def check_room(self, course: Course[P], progress: Progress) -> None:
        """See `Solver`."""

    def clean(self) -> None:
        """See `Solver`."""
        remove_partials(self.target)

    def mark(self, answered: Answered) -> None:
        """See `Solver`."""
        sync_tree(self.target, files=False)
        mark(self.directory, self.stages[0], answered)

    def job(self, plan: P, given: ReductionInput, kept: Path | None = None) -> ReductionJob[P]:
        """Return the settings for the tasks of all passes."""
        request = self.request
        return ReductionJob(
            # workers elsewhere have another current directory
            gradients=self.gradients.path.absolute(),
            tested=request.tested,
            relevance=self.target.absolute(),
            n_samples=request.n_samples,
            tests=request.columns.tests,
            groups=request.groups,
            kept=None if kept is None else kept.absolute(),
            plan=plan,
            rows=request.method.rows,
            prefix=self.gradients.prefix,
            checkpoints=request.checkpoints,
            in_place=not given.processes,
            top=given.top,
        )

    def conclude(self) -> None:
        """See `Solver`."""

    def found_before(self) -> Found:
        """See `Solver`."""
        return {}

    # ------------------------------------------------------------------ words

    def units(self, given: ReductionInput, plan: P) -> Units:
        """See `Solver`."""
        return Units(given.n_read, given.n_read * plan.passes, "rows")


def reduction_input(
    gradients: Gradients,
    tested: WhichTests,
    n_samples: int,
    columns: ResultColumns,
    memory_bytes: int,
    workers: Workers,
) -> ReductionInput:
    """Return the sizes that a plan is made from, from the store's metadata."""
    rows, tests, layout = gradients.rows, tested.rows(gradients), gradients.layout
    return ReductionInput(
        n_rows=rows.n_rows,
        n_features=layout.n_features,
        n_folding=sum(s.columns[1] - s.columns[0] for s in dense_segments(layout)),
        n_samples=n_samples,
        n_tests=max(1, columns.n_tests),
        n_columns=columns.n_columns,
        grouped=columns.by in GROUPINGS,
        n_steps=gradients.n_steps,
        n_blocks=len(layout.blocks),
        n_groups=gradients.n_groups,
        item_bytes=rows.dtype.itemsize,
        test_item_bytes=tests.dtype.itemsize,
        shard_rows=rows.shard_rows,
        chunk_rows=rows.chunk_rows,
        chunk_features=rows.chunk_features,
        memory_bytes=memory_bytes,
        workers=workers.count,
        processes=workers.processes,
        threads=workers.threads,
        base_bytes=base_bytes(workers.resident_bytes),
        part_rows=rows.part_rows,
    )
