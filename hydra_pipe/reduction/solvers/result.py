"""Common base of the solvers that fill a relevance array."""

from pathlib import Path
from typing import Any, TypeVar

from hydra_pipe.plan.records import Answered, Plan, ReadingPlan, ReductionInput
from hydra_pipe.progress import Progress
from hydra_pipe.reduction import kernels
from hydra_pipe.reduction.resume import marked
from hydra_pipe.reduction.solvers.base import Course
from hydra_pipe.reduction.solvers.common import CommonSolver
from hydra_pipe.store import names
from hydra_pipe.store.data.coordinates import own_coordinates, shared_coordinates, write_coordinates
from hydra_pipe.store.data.recording import committed
from hydra_pipe.store.data.relevance import (
    chunk_samples,
    columns_of,
    create_relevance,
    open_relevance,
)
from hydra_pipe.store.data.top_samples import TopSamples, create_top_samples
from hydra_pipe.store.disk_space import room_for, say_if_tight
from hydra_pipe.store.files import remove
from hydra_pipe.store.run.permission import check_stages
from hydra_pipe.store.run.stages import RECORD, StageId
from hydra_pipe.units import format_bytes, format_seconds

P = TypeVar("P", bound=Plan)
R = TypeVar("R", bound=ReadingPlan)


class ResultSolver(CommonSolver[P]):
    """Solver that fills the relevance array of a request."""

    # True if a first pass may take long and is divided by the memory of its process. The memory is
    # noted at the start, so that later calls resume the work, or begin it anew, with the same
    # memory.
    divided_by_memory = False

    @property
    def stages(self) -> tuple[StageId, ...]:
        """See `Solver`."""
        return (self.request.stage,)

    @property
    def target(self) -> Path:
        """Path of the relevance array, or of the group of the top samples."""
        return self.directory.path / self.stages[0].area

    def has_work(self) -> bool:
        """See `Solver`."""
        return self.directory.has_work(self.stages[0], self.request.settings)

    # ------------------------------------------------------------------ going on

    def answered(self) -> Answered | None:
        """See `Solver`."""
        found = marked(self.directory.stages.get(self.stages[0]))
        return found[0] if found is not None and found[0].done <= self.most(found[0]) else None

    def most(self, answered: Answered) -> int:
        """Return the largest possible amount of work, in the units of `answered`."""
        return max(1, self.request.columns.n_tests)

    def fits(self, plan: P) -> bool:
        """See `CommonSolver`."""
        n_samples, columns = self.request.n_samples, self.request.columns
        grouped = columns.by is not None
        if self.request.options.top is not None:
            tops = TopSamples(self.target, self.directory.run_id)
            # settings say how many samples each side has, and blocks of samples fill no chunks
            return tops.columns == columns and plan.fills((1, tops.chunks[0]), grouped=grouped)
        array = open_relevance(self.target.parent, self.target.name)
        if columns_of(array) != columns or array.shape != (n_samples, columns.n_columns):
            return False
        as_made = array.shards is None and array.chunks[0] == chunk_samples(n_samples)
        return as_made and plan.fills(array.chunks, grouped=grouped)

    # ------------------------------------------------------------------ beginning and ending

    def create(self, course: Course[P]) -> None:
        """See `Solver`. Results that depend on an earlier relevance are removed."""
        request, directory, stage = self.request, self.directory, self.request.stage
        check_stages(directory.path, *self.stages, *stage.results)
        # the manifest changes before the files do
        directory.forget(*stage.results)
        directory.begin(stage, request.settings)
        self.claim()
        for place in (place for one in (stage, *stage.results) for place in one.places):
            remove(directory.path / place)
        if course.given.top is None:
            self._create_relevance(course)
        else:
            create_top_samples(
                self.target,
                self._attributes,
                request.columns,
                course.given.top,
                _chunk_width(course),
                directory.run_id,
            )
        if self.divided_by_memory:
            self.mark(Answered(course.plan.order, 0, course.given.base_bytes))

    @property
    def _attributes(self) -> dict[str, str]:
        method = self.request.method
        return {names.METHOD: method.name, names.SIGN: method.sign, names.UNIT: method.unit}

    def _create_relevance(self, course: Course[P]) -> None:
        """Create the array, and the coordinates of its samples and columns."""
        request, directory, name = self.request, self.directory, self.request.name
        own = committed(directory.stages[RECORD])
        n_tests = 0 if own is None else own.n_tests
        is_whole = (
            request.options.probe is None
            and request.columns.by is None
            and request.columns.tests == ((0, n_tests),)
        )
        store, n_samples = self.target.parent, course.given.n_samples
        create_relevance(
            store,
            name,
            self._attributes,
            n_samples,
            request.columns,
            _chunk_width(course),
            directory.run_id,
            whole=is_whole,
        )
        coordinates = shared_coordinates(
            self.gradients.labels(names.TRAIN_LABELS),
            self.gradients.labels(names.TEST_LABELS),
            n_samples,
            n_tests,
        )
        write_coordinates(
            store,
            coordinates if is_whole else {**coordinates, **own_coordinates(name, request.columns)},
        )

    def claim(self) -> None:
        """Claim the stages that are written beside the relevance."""

    def facts(self, given: ReductionInput) -> dict[str, Any]:
        """See `Solver`."""
        found: dict[str, Any] = {
            "n_tests": self.request.columns.n_tests,
            "n_columns": given.n_columns,
        }
        return found if given.top is None else found | {"n_top": given.top}

    # ------------------------------------------------------------------ words

    def check_room(self, course: Course[P], progress: Progress) -> None:
        """See `Solver`."""
        say_if_tight(course.plan.written_bytes, self.directory.path, progress)

    def say_before(self, course: Course[P], progress: Progress) -> None:
        """See `Solver`."""
        if course.after is not None:
            progress.say(f"resuming after {course.after.done:,} {self.noun_of(course.plan)}")
        if kernels.compiled is None:
            progress.say(
                f"the inner loops are not compiled, and take twice as long: {kernels.WHY_NOT}"
            )

    def noun_of(self, plan: P) -> str:
        """Return the word for the units of work done."""
        return "test samples"


def _chunk_width(course: Course[Any]) -> int:
    """Return the columns of a chunk of the result."""
    given = course.given
    n_columns: int = course.plan.chunk_width(given.n_columns if given.grouped else None)
    return n_columns


class ReadingSolver(ResultSolver[R]):
    """Solver that fills a relevance array from stored values, without training."""

    def summary(self, course: Course[R]) -> str:
        """See `Solver`."""
        given, plan = course.given, course.plan
        return (
            f"{self.amount(given)}, {given.n_tests:,} test samples: {plan.order}, {plan.passes} "
            f"pass{'es' if plan.passes > 1 else ''} of {plan.workers} workers, "
            f"{plan.reading.rows}x{plan.reading.features} "
            f"decoded at once, {format_bytes(plan.read_bytes)} to decode, at most "
            f"{format_bytes(plan.peak_bytes)} of memory"
            + (
                f" in each process, {format_bytes(plan.moved_bytes)} between them"
                if given.processes
                else ""
            )
        )

    def amount(self, given: ReductionInput) -> str:
        """Describe in one line how much is read."""
        return f"{given.n_read:,} rows x {given.n_features:,} features"

    def sizes(self, given: ReductionInput) -> dict[str, str]:
        """Describe the values that are read and their number: a name and a value for each line."""
        return {
            "rows x features": (
                f"{given.n_read:,} x {given.n_features:,} ({given.n_folding:,} of these can be "
                "folded)"
            )
        }

    def describe(self, course: Course[R]) -> dict[str, str]:
        """See `Solver`."""
        given, plan = course.given, course.plan
        return self.sizes(given) | {
            "samples x tests": f"{given.n_samples:,} x {given.n_tests:,}"
            + (f", in {given.n_columns:,} groups" if given.grouped else "")
            + ("" if given.top is None else f", of which {given.top:,} on each side are kept"),
            "order": plan.order,
            "passes": f"{plan.passes:,}, of {plan.width:,} {plan.noun} each",
            "tasks": f"{plan.tasks:,}, {plan.workers} at once",
            "decoded at once": f"{plan.reading.rows:,} rows x {plan.reading.features:,} features",
            "read": f"{format_bytes(plan.read_bytes)} decoded",
            "written": room_for(plan.written_bytes, self.directory.path),
            "between workers": f"at most {format_bytes(plan.moved_bytes)}",
            "operations": (
                f"{plan.operations:,} of matrix products, {plan.folded_values:,} values folded"
            ),
            "peak memory": (
                f"at most {format_bytes(plan.peak_bytes)}, of {format_bytes(given.memory_bytes)}"
            )
            + (" in each process" if given.processes else ""),
            "time": (
                f"about {format_seconds(plan.lasting_picoseconds / 1e12)} where "
                "benchmarks/RESULTS.md was measured"
            ),
        }
