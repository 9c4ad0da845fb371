"""What every solver is: what `reduction/run.py` asks of it, from a plan to a finished stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from dask.delayed import Delayed

from hydra_pipe.plan.records import Answered, Found, Plan, ReductionInput, Span
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.executors.base import CountRows, Scheduler, Workers
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.run import RunDirectory
from hydra_pipe.store.stages import StageId

P = TypeVar("P", bound=Plan, covariant=True)


@dataclass(frozen=True)
class Course(Generic[P]):
    """What is left of a reduction, and how it is done.

    Args:
        after: what was answered before; None: it begins.
        given: what there is to reduce.
        plan: plan of what is left.
        whole: plan of all.
    """

    after: Answered | None
    given: ReductionInput
    plan: P
    whole: P


@dataclass(frozen=True)
class Units:
    """What progress counts.

    Args:
        of_pass: units of the graph of a pass.
        total: units of all passes.
        noun: the word for them.
    """

    of_pass: int
    total: int
    noun: str


class Solver(Protocol):
    """Computes what a stage claims, pass by pass, and goes on where it was interrupted."""

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
        """Stages that are written: the first is the solver's own, the others are kept on the way."""

    def has_work(self) -> bool:
        """Whether anything of it is not there yet."""

    def answered(self) -> Answered | None:
        """What an interrupted call has done, as far as it counts for this one."""

    def course(self, workers: Workers, after: Answered | None) -> Course[Any]:
        """How to go on after what was answered, if that still fits; else how to begin. Raises: BudgetError."""

    def check_room(self, course: Course[Any], progress: Progress) -> None:
        """Say, or refuse, what the disk has no room for. Raises: BudgetError."""

    def create(self, course: Course[Any]) -> None:
        """Make what is to be filled: first the claim, then what is claimed."""

    def clean(self) -> None:
        """Remove what a process that was killed has left in the middle of."""

    def mark(self, answered: Answered) -> None:
        """Note in the manifest that so much is done, once that is safe on the disk."""

    def passes(self, course: Course[Any], count_rows: CountRows) -> Iterator[tuple[Span, Delayed]]:
        """The passes in order: what each answers, and its graph, which gives what the pass has found.

        Building a graph reads nothing; computing it writes what it answers. A task that runs again writes the same bytes.
        """

    def conclude(self) -> None:
        """End what was kept on the way, and remove what is of no use any more."""

    def facts(self, given: ReductionInput) -> dict[str, Any]:
        """What the manifest keeps of the result, beside its plan and what the passes have found."""

    def found_before(self) -> Found:
        """What is known of the result before its passes."""

    @property
    def doing(self) -> str:
        """What progress is of."""

    def units(self, given: ReductionInput, plan: Any) -> Units:
        """What progress counts."""

    def say_before(self, course: Course[Any], progress: Progress) -> None:
        """Say what is gone on with, and what to mind."""

    def summary(self, course: Course[Any]) -> str:
        """The plan in one line."""

    def describe(self, course: Course[Any]) -> dict[str, str]:
        """The plan in lines, for people: what, and how much."""
