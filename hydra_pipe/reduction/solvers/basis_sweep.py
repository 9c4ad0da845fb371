"""The sweep of test gradients in a basis: `hydra-fisher` at a fraction of its operations.

A first task finds the basis and keeps it beside the array, so that a resumed sweep has the same
one. Then blocks of columns are swept as in `sweep.py`: the core by `reduction/sweep.py`, the rest
by `reduction/shells.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from dask.delayed import Delayed, delayed

from hydra_pipe.plan.basis_sweep import (
    BASIS_ROWS,
    BASIS_TESTS,
    BasisInput,
    BasisSweepPlan,
    plan_basis_sweep,
)
from hydra_pipe.plan.id_ranges import cut, size_of
from hydra_pipe.plan.records import Answered, ReductionInput
from hydra_pipe.plan.sweep import SweepPlan
from hydra_pipe.reduction.basis import Basis, Rotated, fitted
from hydra_pipe.reduction.blas import single_threaded_blas
from hydra_pipe.reduction.executors.base import CountRows
from hydra_pipe.reduction.job import ReductionJob
from hydra_pipe.reduction.kernels import Workspace, add_rows
from hydra_pipe.reduction.parts import Part, Sides, parts_of
from hydra_pipe.reduction.request import ReductionRequest
from hydra_pipe.reduction.shells import Shells
from hydra_pipe.reduction.solvers.base import Course
from hydra_pipe.reduction.solvers.sweep import Backward, Running, Sweep, graphs, sweep_input
from hydra_pipe.reduction.steps import StepRows
from hydra_pipe.reduction.sweep import Sweep as BackwardSweep
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.rows import Rows
from hydra_pipe.store.data.sweep_state import load_basis, save_basis
from hydra_pipe.types import F32, Span

# Rows and test gradients are read in so many runs of neighbours, spread evenly.
_RUNS = 32


class BasisSweep(Sweep):
    """Solver that computes relevance by a backward sweep of each column in a basis.

    Args:
        request: the reduction that is asked for.
        rank: number of columns of the core.
    """

    def __init__(self, request: ReductionRequest, rank: int) -> None:
        super().__init__(request)
        self._rank = rank

    def plan(self, given: ReductionInput, after: Answered | None) -> BasisSweepPlan:
        """See `CommonSolver`."""
        _, series = self.gradients.schedules()
        of_features = sweep_input(self.request, given)
        what = BasisInput(
            **vars(replace(of_features, width=min(self._rank, of_features.width))),
            sides=tuple(part.widths for part in parts_of(self.gradients.layout, series)),
            n_series=len(set(series.tolist())),
        )
        return plan_basis_sweep(what, 0 if after is None else after.done)

    def passes(
        self, course: Course[SweepPlan], count_rows: CountRows
    ) -> Iterator[tuple[Span, Delayed]]:
        """See `Solver`. The first task of a pass finds the basis, or reads it."""
        job = self.job(course.plan, course.given)
        return graphs(job, delayed(find_basis)(job), count_rows)

    def sizes(self, given: ReductionInput) -> dict[str, str]:
        """See `ReadingSolver`."""
        width = self.gradients.layout.whole_width
        return super().sizes(given) | {
            "basis": f"{self._rank:,} columns for {width:,} features, and each test's own gradient"
        }


class InBasis(Backward):
    """Backward sweep that begins with test gradients or their means, in a basis.

    Args:
        basis: the basis.
    """

    def __init__(self, basis: Basis) -> None:
        self._basis = basis

    def begin(
        self, job: ReductionJob[Any], store: Gradients, columns: Span
    ) -> Running[BackwardSweep]:
        """See `Direction`."""
        basis, averages = self._basis, job.averages()
        spans = cut(job.tests, *(columns if averages is None else (0, len(averages))))
        whole = parts_of_rows(basis.parts, job.tested.rows(store), store.layout.n_features, spans)
        if averages is not None:
            averages = averages[:, slice(*columns)]
            used = averages.any(axis=1)
            averages = averages[used]
            whole = [tuple(side[used] for side in sides) for sides in whole]
        tests = Rotated(basis.multiplied(whole), basis.rotated(whole).along)
        starts: F32 = np.empty((len(whole[0][0]), basis.width), np.float32)
        basis.coordinates(tests, starts)
        schedule, _ = store.schedules()
        sweep = BackwardSweep(
            starts if averages is None else averages.T @ starts,
            schedule,
            basis.spans,
            job.n_samples,
        )
        squares = basis.squared_norms(tests, whole)
        shells = Shells(squares, basis.series_of_shells, schedule)
        return _RunningInBasis(sweep, shells, basis, tests, averages)


class _RunningInBasis(Running[BackwardSweep]):
    """A sweep in its course, which takes rows in a basis.

    Args:
        sweep: sweep of the core.
        shells: adjoints outside of the core.
        basis: the basis.
        tests: parts of the test gradients.
        averages: matrix that averages tests into columns, shape (test, column), float32, or None.
    """

    def __init__(
        self,
        sweep: BackwardSweep,
        shells: Shells,
        basis: Basis,
        tests: Rotated,
        averages: F32 | None,
    ) -> None:
        self.sweep, self._shells, self._basis = sweep, shells, basis
        self._tests, self._averages = tests, averages
        self._workspace = Workspace()

    def take(self, rows: StepRows, weight: F32, count: F32) -> None:
        """See `Running`."""
        basis = self._basis
        whole = basis.rotated([part.of(rows.stored, weight) for part in basis.parts])
        core = self._workspace.matrix(len(rows.sample), basis.width)
        basis.coordinates(whole, core)
        self.sweep.step(rows.step, core, count, rows.rho, rows.sample)
        scores = basis.scores(whole, self._tests)
        found = self._shells.step(rows.step, scores, count, rows.rho)
        if self._averages is not None:
            found = found @ self._averages
        add_rows(np.ascontiguousarray(found), rows.sample, self.sweep.sums)

    def arrays(self) -> dict[str, F32]:
        """See `Running`."""
        return self.sweep.arrays() | self._shells.arrays()

    def restore(self, arrays: dict[str, F32]) -> None:
        """See `Running`."""
        self.sweep.restore(arrays)
        self._shells.restore(arrays)


@single_threaded_blas
def find_basis(job: ReductionJob[BasisSweepPlan]) -> InBasis:
    """Read the basis of a reduction; find and keep it if there is none."""
    store = job.store()
    parts = parts_of(store.layout, store.schedules()[1])
    preconditioner = job.preconditioner(store)
    kept = load_basis(job.relevance, job.plan.basis_bytes)
    basis = None if kept is None else Basis.of_state(parts, preconditioner, *kept)
    if basis is None:
        tests = [
            span for run in spread(size_of(job.tests), BASIS_TESTS) for span in cut(job.tests, *run)
        ]
        n_features = store.layout.n_features
        groups = [
            parts_of_rows(parts, store.rows, n_features, spread(store.rows.n_rows, BASIS_ROWS)),
            parts_of_rows(parts, job.tested.rows(store), n_features, tests),
        ]
        basis = fitted(parts, preconditioner, groups, job.plan.rank)
        save_basis(job.relevance, basis.boxes, basis.arrays())
    return InBasis(basis)


def spread(n: int, most: int) -> list[Span]:
    """Return runs of neighbours, spread evenly over [0, n), with at most `most` in all."""
    wanted = min(n, most)
    n_runs = min(_RUNS, wanted)
    starts = [i * n // n_runs for i in range(n_runs)]
    sizes = [(i + 1) * wanted // n_runs - i * wanted // n_runs for i in range(n_runs)]
    return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def parts_of_rows(
    parts: Sequence[Part], rows: Rows, n_features: int, spans: Sequence[Span]
) -> list[Sides]:
    """Return the parts of some rows or test gradients.

    Args:
        parts: the parts of a row.
        rows: stored rows or test gradients.
        n_features: number of stored columns.
        spans: first of the rows to read and one past the last, ascending.
    """
    found: list[list[Sides]] = [[] for _ in parts]
    for span in spans:
        own = slice(*span)
        stored, scales = rows.features(own, slice(0, n_features)), rows.scales(own)
        for part, pieces in zip(parts, found, strict=True):
            pieces.append(part.of(stored, scales))
    return [tuple(np.concatenate(side) for side in zip(*pieces, strict=True)) for pieces in found]
