"""A whole reduction: plan, compute pass by pass, write. An interrupted reduction is resumed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra_pipe.plan.records import Answered, Found, Plan
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.executors.base import Scheduler
from hydra_pipe.reduction.request import ReductionRequest
from hydra_pipe.reduction.resume import combined, run_again
from hydra_pipe.reduction.solvers.base import Course, Solver
from hydra_pipe.store.run.stage_runner import completing, taken_up


def reduce_request(
    request: ReductionRequest, *, overwrite: bool = False, progress: Progress | None = None
) -> bool:
    """Carry out a request. See `hydra_pipe.reduce` for its arguments and for the errors it raises.

    Returns:
        Whether there was anything to do.
    """
    return solve(solvers_of(request), overwrite=overwrite, progress=progress)


@dataclass(frozen=True)
class ReductionPlan:
    """The plan of a reduction: what `reduce` would do. `print(plan)` gives the lines of --dry-run.

    Args:
        plans: plan of each part of the work, in order. Most reductions have one part.
        text: the plan in lines for people.
    """

    plans: tuple[Plan, ...]
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def peak_bytes(self) -> int:
        """Upper bound of the memory of the process, in bytes; of each process, if several work."""
        return max(plan.peak_bytes for plan in self.plans)

    @property
    def read_bytes(self) -> int:
        """Decoded bytes that go through the workers, over all passes."""
        return sum(plan.read_bytes for plan in self.plans)

    @property
    def written_bytes(self) -> int:
        """Size of the results in bytes, before compression."""
        return sum(plan.written_bytes for plan in self.plans)

    @property
    def passes(self) -> int:
        """Number of times that the store is read."""
        return sum(plan.passes for plan in self.plans)

    @property
    def tasks(self) -> int:
        """Number of tasks in the Dask graphs."""
        return sum(plan.tasks for plan in self.plans)


def plan_request(request: ReductionRequest) -> ReductionPlan:
    """Plan the work of `reduce_request`. Reads metadata only. Raises: BudgetError."""
    return planned(solvers_of(request))


def solvers_of(request: ReductionRequest) -> Sequence[Solver]:
    """Return the solvers of a request. Its method must not be one that trains."""
    assert request.method.solvers is not None
    return request.method.solvers(request)


def solve(
    solvers: Sequence[Solver], *, overwrite: bool = False, progress: Progress | None = None
) -> bool:
    """Let solvers do their work, one after the other.

    Arguments, errors and the returned value are the same as for `reduce_request`.
    """
    worked = False
    for solver in solvers:
        worked = _solve(solver, overwrite, progress or Progress()) or worked
    return worked


def planned(solvers: Sequence[Solver]) -> ReductionPlan:
    """Plan the work of solvers.

    Raises:
        BudgetError: the work does not fit into the memory.
        HydraError: a solver trains again, and its pipeline cannot be loaded.
    """
    with solvers[0].scheduler as using:
        courses = [solver.course(using.workers, None) for solver in solvers]
    parts = [_aligned(s.describe(course)) for s, course in zip(solvers, courses, strict=True)]
    plans = tuple(course.plan for course in courses)
    return ReductionPlan(plans, "\n\nThen, from these:\n".join(parts))


def _aligned(lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def _solve(solver: Solver, overwrite: bool, progress: Progress) -> bool:
    def has_work() -> bool:
        return overwrite or solver.has_work()

    with taken_up(
        solver.directory, *solver.stages, has_work=has_work, progress=progress
    ) as is_needed:
        if is_needed:
            _fill(solver, overwrite, progress)
    return is_needed


def _fill(solver: Solver, overwrite: bool, progress: Progress) -> None:
    directory, stage = solver.directory, solver.stages[0]
    with solver.scheduler as using:
        course = solver.course(using.workers, None if overwrite else solver.answered())
        solver.check_room(course, progress)
        using.start(solver.gradients.path, directory.run_id, course.plan.peak_bytes)
        if course.after is None:
            solver.create(course)
        else:
            run_again(directory, stage)
            solver.clean()
        solver.say_before(course, progress)
        progress.say(solver.summary(course))
        with completing(directory, stage) as work:
            passes = _compute(solver, course, using, progress)
            solver.conclude()
            work.facts |= solver.facts(course.given) | {"plan": course.whole.facts()}
            work.facts |= combined(passes) | solver.found_before()


def _compute(
    solver: Solver, course: Course[Any], using: Scheduler, progress: Progress
) -> tuple[Found, ...]:
    """Compute pass by pass. Return the findings of these passes, after those of earlier ones."""
    plan, units = course.plan, solver.units(course.given, course.plan)
    found = () if course.after is None else course.after.found
    with progress.task(solver.doing, units.total, units.noun) as task:
        for span, graph in solver.passes(course, using.counter(task.advance, units.of_pass)):
            of_pass: Found = using.compute(graph)
            # sums take many passes and find nothing: empty findings would fill the manifest
            found += (of_pass,) if of_pass else ()
            solver.mark(Answered(plan.order, span[1], course.given.base_bytes, found))
    return found
