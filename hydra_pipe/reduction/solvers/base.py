"""The interface of solvers, as `reduction/run.py` calls them from a plan to a finished stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from dask.delayed import Delayed

from hydra_pipe.plan.records import Answered, Found, Plan, ReductionInput
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.executors.base import CountRows, Scheduler, Workers
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import StageId
from hydra_pipe.types import Span

P = TypeVar("P", bound=Plan, covariant=True)


@dataclass(frozen=True)
class Course(Generic[P]):
    """The rest of a reduction, and its plan.

    Args:
        after: work that was done before. None: the reduction begins.
        given: sizes of the reduction.
        plan: plan of the work that is left.
        whole: plan of all the work.
    """

    after: Answered | None
    given: ReductionInput
    plan: P
    whole: P


@dataclass(frozen=True)
class Units:
    """Units of the progress display.

    Args:
        of_pass: number of units in the graph of a pass.
        total: number of units in all passes.
        noun: word for the units.
    """

    of_pass: int
    total: int
    noun: str


class Solver(Protocol):
    """Solver of a stage. It computes the result pass by pass, and resumes after an interruption."""

    @property
    def directory(self) -> RunDirectory:
        """The run."""

    @property
    def gradients(self) -> Gradients:
        """The recording."""

    @property
    def scheduler(self) -> Scheduler:
        """The executor that computes, not entered yet."""

    @property
    def stages(self) -> tuple[StageId, ...]:
        """Stages that the solver writes. The first is its own. The others are kept on the way."""

    def has_work(self) -> bool:
        """Tell whether any result of the stages is missing."""

    def answered(self) -> Answered | None:
        """Return the work of an interrupted call that counts for this one, or None."""

    def course(self, workers: Workers, after: Answered | None) -> Course[Any]:
        """Plan how to resume after `after` if that work still fits, else how to begin.

        Raises:
            BudgetError: the work does not fit into the memory.
        """

    def check_room(self, course: Course[Any], progress: Progress) -> None:
        """Warn about, or refuse, results that the disk has no room for. Raises: BudgetError."""

    def create(self, course: Course[Any]) -> None:
        """Claim the stages in the manifest, then create the arrays to fill."""

    def clean(self) -> None:
        """Remove half-written files of a process that was killed."""

    def mark(self, answered: Answered) -> None:
        """Make the work so far safe on the disk, then note it in the manifest."""

    def passes(self, course: Course[Any], count_rows: CountRows) -> Iterator[tuple[Span, Delayed]]:
        """Yield the passes in order: the span that each answers, and its graph.

        Building a graph reads nothing. Computing it writes the answers and returns the findings of
        the pass. A task that runs again writes the same bytes.
        """

    def conclude(self) -> None:
        """Complete the stages kept on the way, and remove files that are of no use any more."""

    def facts(self, given: ReductionInput) -> dict[str, Any]:
        """Return facts of the result for the manifest, beside the plan and the passes' findings."""

    def found_before(self) -> Found:
        """Return findings that are known before the passes."""

    @property
    def doing(self) -> str:
        """Name of the work in the progress display."""

    def units(self, given: ReductionInput, plan: Any) -> Units:
        """Return the units of the progress display."""

    def say_before(self, course: Course[Any], progress: Progress) -> None:
        """Say how much was done before, and what the user should mind."""

    def summary(self, course: Course[Any]) -> str:
        """Describe the plan in one line."""

    def describe(self, course: Course[Any]) -> dict[str, str]:
        """Describe the plan for people: a name and a value for each line."""
