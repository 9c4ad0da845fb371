"""What a reduction is asked for, checked against what there is, and planned."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from dask.delayed import Delayed
from numpy.typing import NDArray

from hydra_pipe.errors import RunError, StoreError, UsageError
from hydra_pipe.plan.answering import AnswerInput, plan_answers
from hydra_pipe.plan.costs import base_bytes
from hydra_pipe.plan.layout import Layout
from hydra_pipe.plan.parts import shards_of
from hydra_pipe.plan.reduction import (
    BY_SAMPLES,
    FROM_MATRIX,
    Answered,
    Found,
    ReductionInput,
    ReductionPlan,
    Span,
    parse_chunks,
    plan_reduction,
)
from hydra_pipe.plan.selection import parse_selection
from hydra_pipe.plan.solving import SolveInput, plan_solve
from hydra_pipe.plan.sweeping import SweepInput, plan_matrix, plan_sweep
from hydra_pipe.reduction.executors import executor_of
from hydra_pipe.reduction.executors.base import CountRows, Scheduler, Workers
from hydra_pipe.reduction.expansion import Expansion
from hydra_pipe.reduction.hydra import Job
from hydra_pipe.reduction.methods import METHODS, Method, method_named
from hydra_pipe.reduction.segments import dense_segments
from hydra_pipe.reduction.weights import Ints, last_rows
from hydra_pipe.store import names
from hydra_pipe.store.counts import Counts
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.hypergradients import HYPERGRADIENTS_UNREADABLE, HypergradientMatrix, Hypergradients
from hydra_pipe.store.prefix import open_recording
from hydra_pipe.store.probes import WhichTests, tested_by
from hydra_pipe.store.relevance import Columns
from hydra_pipe.store.results import BY_LABEL, GROUPINGS, ITSELF, MEAN, ResultName
from hydra_pipe.store.run import PRUNED, RunDirectory
from hydra_pipe.store.space import room_for
from hydra_pipe.store.stages import KEEP, RECORD, REDUCE, Settings, Stage, StageId
from hydra_pipe.units import format_bytes, format_seconds, parse_bytes

# orders whose passes are each of some samples
_OF_SAMPLES = ("fold first", BY_SAMPLES)
# why chunks are not the user's to choose
_READING = {
    "sweep": "reads whole files, step by step",
    "solve": "divides what it reads by what its matrix leaves",
    "replay": "reads no rows",
}
# The same command takes a little more or less memory each time, by which no reduction that goes on may be divided otherwise. What
# is spared of the bounds (benchmarks/RESULTS.md) is more.
_SAME_BASE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Options:
    """What a user asks of a reduction, as text: see `hydra_pipe.reduce`."""

    method: str = "hydra"
    chunks: str = "auto"
    memory: str = "4GiB"
    scheduler: str = "threads"
    tests: str | None = None
    by: str | None = None
    keep_hypergradients: bool = False
    upto: int | None = None
    rank: int | None = None
    test: str | None = None


class Engine(Protocol):
    """How a method is computed that needs more than the store: what `reduction/run.py` asks of it."""

    def resident_bytes(self) -> int:
        """What this process takes when all that it needs is there. Raises: what loading a pipeline does."""

    def plan(self, given: ReductionInput, answered: Answered | None) -> ReductionPlan:
        """How it goes through; after what was answered before. Raises: BudgetError."""

    def passes(self, job: Job, count_rows: CountRows) -> Iterator[tuple[Span, Delayed]]:
        """As `reduction/hydra.py` has them."""

    def n_counted(self, plan: ReductionPlan) -> int:
        """Rows that all passes count."""

    def lines(self, plan: ReductionPlan) -> dict[str, str]:
        """The plan, for people: what, and how much."""


@dataclass(frozen=True)
class Request:
    """A reduction that can be: checked options, and a complete recording, or the first steps of one.

    Args:
        directory, gradients: of the run.
        n_samples: training samples.
        method: that is asked for.
        tested: which test gradients, the last ones where several are used.
        checkpoints: steps of all that are used, ascending.
        columns: of the result.
        groups: group of each test sample, shape (test,), where columns are their means.
        last: the last row of each sample, where the method looks at no others; else None.
        options: as given.
        scheduler: that is to compute it, not entered yet.
        engine: of a method that needs more than the store.
    """

    directory: RunDirectory
    gradients: Gradients
    n_samples: int
    method: Method
    tested: WhichTests
    checkpoints: tuple[int, ...]
    columns: Columns
    groups: NDArray[np.int64] | None
    last: Ints | None
    options: Options
    scheduler: Scheduler
    engine: Engine | None = None

    @property
    def name(self) -> str:
        """Of the result."""
        options = self.options
        return str(ResultName(options.method, options.by, options.upto, options.rank, options.test))

    @property
    def stage(self) -> StageId:
        """The stage that computes the result."""
        return REDUCE.of(self.name)

    @property
    def settings(self) -> Settings:
        """What the result depends on."""
        selected = {} if self.options.tests is None else {"tests": self.columns.to_attributes()[names.TESTS]}
        first = {} if self.options.upto is None else {names.UPTO: self.options.upto}
        tested = {"checkpoint": self.tested.step} if self.method.of_tests else {}
        return tested | selected | first

    @property
    def kept(self) -> Path:
        """Where hypergradients of the method are, or would be."""
        return self.directory.path / self.keep_stage.area

    @property
    def keep_stage(self) -> StageId:
        """The stage that keeps them."""
        return KEEP.of(self.method.name)

    @property
    def from_kept(self) -> bool:
        """Whether kept hypergradients answer it."""
        # what is kept is of all steps
        wanted = not self.options.keep_hypergradients and self.options.upto is None and self.method.keeps
        return wanted and self.method.name in self.directory.complete(KEEP)

    @property
    def fills(self) -> bool:
        """Whether a matrix of hypergradients is to be kept, before anything is answered from it."""
        return self.options.keep_hypergradients and self.method.work == "sweep"

    def plan(self, workers: Workers, answered: Answered | None = None) -> tuple[ReductionInput, ReductionPlan]:
        """What there is to reduce, and how; after what was answered before. Raises: BudgetError."""
        memory_bytes = parse_bytes(self.options.memory)
        if self.engine is not None:
            workers = replace(workers, resident_bytes=self.engine.resident_bytes())
        given = reduction_input(self.gradients, self.tested, self.n_samples, self.columns, memory_bytes, workers)
        given = replace(
            given,
            keeping=self.options.keep_hypergradients,
            kept=self.from_kept,
            folds=self.method.of_tests and self.last is None and len(self.checkpoints) == 1,
            norms=self.method.cosine or not self.method.of_tests,
            checkpoints=len(self.checkpoints),
        )
        if self.last is not None:
            given = replace(given, shards=tuple(shards_of(self.last.tolist(), given.part_rows, given.shard_rows)))
        if answered is not None and abs(answered.base_bytes - given.base_bytes) <= _SAME_BASE_BYTES:
            given = replace(given, base_bytes=answered.base_bytes)
        if self.engine is not None:
            return given, self.engine.plan(given, answered)
        width, done = self.gradients.layout.whole_width, 0 if answered is None else answered.done
        if self.method.work == "solve":
            assert self.last is not None
            return given, plan_solve(SolveInput(given, width, len(self.last)))
        if self.from_kept and self.method.work == "sweep":
            return given, plan_answers(AnswerInput(given, width), done)
        if self.method.work == "sweep":
            most_rows = int(self.gradients.rows_of_steps()[1].sum(axis=1).max(initial=0))
            what = SweepInput(given, width, most_rows, given.n_samples)
            if self.fills:
                way, plan = plan_matrix(what, answered)
                return way.recording, plan
            return given, plan_sweep(what, done)
        return given, plan_reduction(given, parse_chunks(self.options.chunks), answered)

    def going_on(self, workers: Workers, answered: Answered | None, fits: Callable[[Answered, ReductionPlan], bool]) -> "GoingOn":
        """How to go on after what was answered, if that `fits` the plan for it; else how to begin. Raises: BudgetError."""
        given, plan = self.plan(workers, answered)
        if answered is not None and not fits(answered, plan):
            answered = None
            given, plan = self.plan(workers)
        whole = plan if answered is None else self.plan(workers, replace(answered, done=0))[1]
        return GoingOn(answered, given, plan, whole)


@dataclass(frozen=True)
class GoingOn:
    """What is left of a reduction.

    Args:
        after: what was answered before; None: it begins.
        given: what there is to reduce.
        plan, whole: of what is left, and of all.
    """

    after: Answered | None
    given: ReductionInput
    plan: ReductionPlan
    whole: ReductionPlan


def requested(run: str | os.PathLike[str], options: Options) -> Request:
    """Check `options` against a run. Reads metadata, and for methods of the last rows which row is of which sample and step.

    Raises:
        RunError, StoreError, UsageError: see `hydra_pipe.reduce`.
    """
    method = method_named(options.method)
    scheduler = executor_of(options.scheduler)
    if options.by is not None and options.by not in GROUPINGS:
        raise UsageError(f"--by {options.by} is unknown: choose label, or --mean")
    parse_chunks(options.chunks)
    parse_bytes(options.memory)
    _check_method(options, method)
    if options.rank is not None:
        _check_rank(options, method)
    if options.test is not None:
        _check_test(options, method)
    if options.upto is not None and options.keep_hypergradients:
        raise UsageError("--upto and --keep-hypergradients: choose one: what is kept is of all steps")
    directory = RunDirectory.open(run)
    gradients, counts = open_recording(directory, options.upto)
    if method.of_tests and options.test is None:
        counts.require_tests(directory.path)
    if directory.stages[RECORD].facts.get(PRUNED):
        _check_pruned(directory, options, method)
    tested, n_tests = tested_by(directory, gradients, counts.checkpoint, counts.n_tests, options.test)
    checkpoints = _checkpoints(gradients, counts) if method.on_the_way else (counts.checkpoint,)
    last = last_rows(gradients, counts.n_samples) if method.last_rows else None
    if last is not None and not last.size:
        raise RunError(f"{directory.path}: no step has rows: there is nothing that --method {options.method} can be computed from")
    spans = ((0, n_tests),) if options.tests is None else parse_selection(options.tests, n_tests)
    columns, groups = (
        _grouped(Columns(spans), gradients, tested, options.by) if method.of_tests else (Columns((), ITSELF, (ITSELF,)), None)
    )
    found = (counts.n_samples, method, tested, checkpoints, columns, groups, last)
    request = Request(directory, gradients, *found, options, scheduler)
    if request.from_kept:
        _check_kept(request)
    return request


def _check_pruned(directory: RunDirectory, options: Options, method: Method) -> None:
    """Refuse what needs rows that are gone. Raises: RunError."""
    kept = [name for name in directory.complete(KEEP) if name in METHODS and METHODS[name].keeps]
    if method.name not in kept and method.work != "replay":
        able = ", ".join(kept) or "none"
        raise RunError(f"{directory.path}: its gradients were pruned: only {able}, and hydra-exact, are answered without them")
    if options.keep_hypergradients:
        raise RunError(
            f"{directory.path}: its gradients were pruned, and its hypergradients are kept: leave out --keep-hypergradients"
        )


def _check_kept(request: Request) -> None:
    """Hold what is to be answered from against the recording. Raises: StoreError."""
    gradients = request.gradients
    if request.method.work != "sweep":
        Hypergradients(request.kept, gradients).check(gradients, request.n_samples)
        return
    kept = HypergradientMatrix(request.kept, gradients)
    kept.check(gradients, request.n_samples)
    if kept.spans != feature_spans(gradients.layout):
        raise StoreError(f"{kept.path} has other features than {gradients.path}: {HYPERGRADIENTS_UNREADABLE}")


def feature_spans(layout: Layout) -> list[list[object]]:
    """Name of each block, its first feature and the one past its last, in order: as a matrix of hypergradients has them."""
    return [[layout.blocks[block].name, first, last] for first, last, block in Expansion(layout).spans]


def _check_method(options: Options, method: Method) -> None:
    """Refuse options that mean nothing to the method. Raises: UsageError."""
    if options.keep_hypergradients and not method.keeps:
        why = "reads each row once" if method.last_rows or not method.of_tests else "has none that do not depend on the tests"
        why = "weighs rows in another way" if method.on_the_way else why
        raise UsageError(f"--keep-hypergradients is for --method hydra and hydra-fisher: {method.name} {why}")
    if options.chunks != "auto" and method.work != "sum":
        raise UsageError(f"--chunks is for --method hydra: {method.name} {_READING[method.work]}")
    if method.work == "replay" and options.scheduler not in ("threads", "synchronous"):
        raise UsageError(f"--scheduler {options.scheduler}: {method.name} trains again, in this process: leave it out")
    asked = {"--tests": options.tests, "--by": options.by if options.by == BY_LABEL else None}
    asked["--mean"] = options.by if options.by == MEAN else None
    for option, value in asked.items():
        if value is not None and not method.of_tests:
            raise UsageError(f"{option} is for methods of test samples: {method.name} is of each training sample for itself")


def _check_rank(options: Options, method: Method) -> None:
    if method.work != "replay":
        raise UsageError(f"--rank is for --method hydra-exact: {method.name} does not need it")
    if options.by is not None:
        raise UsageError(f"--rank: means by {options.by} are few columns already: leave it out")
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"--rank {options.rank}: give 1 or more")


def _check_test(options: Options, method: Method) -> None:
    if not method.of_tests:
        raise UsageError(f"--test is for methods of test samples: {method.name} is of each training sample for itself")
    if method.on_the_way:
        raise UsageError(
            f"--test {options.test}: {method.name} takes test gradients on the way, and a probe has those at the end of training "
            f"only: choose another method, such as grad-dot"
        )
    if options.upto is not None:
        raise UsageError(
            f"--test {options.test} and --upto: choose one: a probe's gradients were taken at the end of training, not after "
            f"{options.upto} steps"
        )


def _checkpoints(gradients: Gradients, counts: Counts) -> tuple[int, ...]:
    """Steps after which test gradients were taken that count, up to the last. Raises: UsageError: of other test samples."""
    steps = [step for step in gradients.test_steps() if step <= counts.checkpoint]
    for step in steps:
        n_tests = gradients.test_rows(step).n_rows
        if n_tests != counts.n_tests:
            raise UsageError(
                f"{gradients.path} has {n_tests} test gradients after {step} steps and {counts.n_tests} after {counts.checkpoint}: "
                f"--method tracin takes each test sample's at all of them: choose another method, or record with the same tests"
            )
    return tuple(steps)


def left_of(stage: Stage) -> Found:
    """What a reduction keeps of the matrix that it was answered from: the share of the curvature that was left."""
    left = stage.facts.get(names.CURVATURE_LEFT)
    return {names.CURVATURE_LEFT: left} if isinstance(left, float) else {}


def _grouped(
    columns: Columns, gradients: Gradients, tested: WhichTests, by: str | None
) -> tuple[Columns, NDArray[np.int64] | None]:
    if by is None:
        return columns, None
    if by != BY_LABEL:
        return Columns(columns.tests, by, ("mean",)), np.zeros(columns.n_tests, np.int64)
    labels = columns.labels(tested.labels(gradients))
    if labels is None:
        path, how = gradients.path, "record with recorder.record_test(..., labels=...)"
        if tested.probe is not None:
            path, how = tested.probe, "give them to hydra_pipe.probe(..., labels=...)"
        raise UsageError(f"--by label: {path} has no labels of test samples: take the mean of all with --mean, or {how}")
    unique, groups = np.unique(labels, return_inverse=True)
    return Columns(columns.tests, by, tuple(unique.tolist())), groups.astype(np.int64)


def reduction_input(
    gradients: Gradients, tested: WhichTests, n_samples: int, columns: Columns, memory_bytes: int, workers: Workers
) -> ReductionInput:
    """The sizes that a plan is made from, read off the store's metadata."""
    rows, tests = gradients.rows, tested.rows(gradients)
    return ReductionInput(
        n_rows=rows.n_rows,
        n_features=gradients.layout.n_features,
        n_folding=sum(s.columns[1] - s.columns[0] for s in dense_segments(gradients.layout)),
        n_samples=n_samples,
        n_tests=max(1, columns.n_tests),
        n_columns=columns.n_columns,
        grouped=columns.by in GROUPINGS,
        n_steps=gradients.n_steps,
        n_blocks=len(gradients.layout.blocks),
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


def summary(request: Request, given: ReductionInput, plan: ReductionPlan) -> str:
    """The plan in one line."""
    if request.engine is not None:
        return ", ".join(f"{name}: {value}" for name, value in request.engine.lines(plan).items())
    what = f"{given.n_read:,} rows x {given.n_features:,} features"
    if plan.order == FROM_MATRIX:
        what = f"{given.n_samples:,} samples x {request.gradients.layout.whole_width:,} features"
    return (
        f"{what}, {given.n_tests:,} test samples: {plan.order}, {plan.passes} "
        f"pass{'es' if plan.passes > 1 else ''} of {len(plan.row_runs)} workers, {plan.reading.rows}x{plan.reading.features} "
        f"decoded at once, {format_bytes(plan.read_bytes)} to decode, at most {format_bytes(plan.peak_bytes)} of memory"
        + (f" in each process, {format_bytes(plan.moved_bytes)} between them" if given.processes else "")
    )


def described(request: Request, given: ReductionInput, plan: ReductionPlan) -> str:
    """The plan in lines, for people; and whether what is written fits beside the run."""
    run_path = request.directory.path
    if request.engine is not None:
        return aligned(request.engine.lines(plan) | {"written": room_for(plan.written_bytes, run_path)})
    what, blocks = ("samples", plan.sample_blocks) if plan.order in _OF_SAMPLES else ("test samples", plan.test_blocks)
    lines = {"rows x features": f"{given.n_read:,} x {given.n_features:,} ({given.n_folding:,} of these can be folded)"}
    if plan.order == FROM_MATRIX:
        lines = {"hypergradients": f"{given.n_samples:,} samples x {request.gradients.layout.whole_width:,} features"}
    lines |= {
        "samples x tests": f"{given.n_samples:,} x {given.n_tests:,}"
        + (f", in {given.n_columns:,} groups" if given.grouped else ""),
        "order": plan.order,
        "passes": f"{plan.passes:,}, of {blocks[0][1] - blocks[0][0]:,} {what} each",
        "tasks": f"{plan.tasks:,}, {len(plan.row_runs)} at once",
        "decoded at once": f"{plan.reading.rows:,} rows x {plan.reading.features:,} features",
        "read": f"{format_bytes(plan.read_bytes)} decoded",
        "written": room_for(plan.written_bytes, run_path),
        "between workers": f"at most {format_bytes(plan.moved_bytes)}",
        "operations": f"{plan.operations:,} of matrix products, {plan.folded_values:,} values folded",
        "peak memory": f"at most {format_bytes(plan.peak_bytes)}, of {format_bytes(given.memory_bytes)}"
        + (" in each process" if given.processes else ""),
        "time": f"about {format_seconds(plan.lasting_picoseconds / 1e12)} where benchmarks/RESULTS.md was measured",
    }
    return aligned(lines)


def aligned(lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def facts(plan: ReductionPlan) -> dict[str, Any]:
    """What the manifest keeps of a plan."""
    found = asdict(plan) | {"passes": plan.passes, "tasks": plan.tasks, "row_runs": len(plan.row_runs)}
    return found | {"test_blocks": len(plan.test_blocks), "sample_blocks": len(plan.sample_blocks)}
