"""A whole reduction: check, plan, compute pass by pass, write."""

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from hydra_pipe.errors import StoreError, UsageError
from hydra_pipe.plan.reduction import ReductionInput, ReductionPlan, parse_chunks, plan_reduction
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.hydra import Job, graphs
from hydra_pipe.reduction.schedulers import Scheduler, Workers, base_bytes, scheduler_of
from hydra_pipe.reduction.segments import DenseSegment, segments_of
from hydra_pipe.store import names
from hydra_pipe.store.files import remove
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.relevance import create_relevance
from hydra_pipe.store.rows import ROWS_UNREADABLE
from hydra_pipe.store.run import RECORD, RunDirectory, export_stage, reduce_stage
from hydra_pipe.units import format_bytes, format_seconds, parse_bytes

METHODS = ("hydra",)


def reduce_run(
    run: str | os.PathLike[str],
    *,
    method: str = "hydra",
    chunks: str = "auto",
    memory: str = "4GiB",
    scheduler: str = "threads",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Compute the relevance of every training sample for every test sample of a recorded run.

    Args:
        run: directory of the run.
        method: "hydra".
        chunks: rows and features to decode at once, "ROWSxFEATURES", or "auto".
        memory: budget for the whole process, such as "4GiB"; for each worker process where there are such.
        scheduler: "threads", a thread for each core; "processes", a process for each core, which are started and stopped (from a
            script: call this below `if __name__ == "__main__":`, for they import it); the address of a Dask scheduler, such as
            "tcp://host:8786", see docs/cluster.md; or "synchronous" for one thread.
        overwrite: compute again what is there, and discard what was exported from it.
        progress: where to show progress; nowhere if absent.

    Returns:
        Whether there was anything to do.

    Raises:
        RunError: there is no run, or it is not recorded to the end.
        StoreError: the recording is damaged.
        BudgetError: the budget is too small.
        UsageError: an option that cannot be.
        ClusterError: workers of another machine cannot be reached, cannot do this, or are lost.
    """
    request = _request(run, method, chunks, memory, scheduler)
    progress = progress or Progress()
    directory, stage, settings = request.directory, reduce_stage(method), {"checkpoint": request.checkpoint}
    if not overwrite and not directory.has_work(stage, settings):
        return False
    with request.scheduler as using:
        given, plan = request.plan(using.workers)
        using.start(request.gradients.path, directory.run_id, plan.peak_bytes)
        _forget_results(directory, method)
        directory.begin(stage, settings)
        start = time.monotonic()
        # what works elsewhere has another current directory
        relevance = (directory.path / names.RELEVANCE).absolute()
        create_relevance(relevance, method, (given.n_samples, given.n_tests), plan.test_blocks[0][1], directory.run_id)
        progress.say(_summary(given, plan))
        in_place = not given.processes
        job = Job(request.gradients.path.absolute(), request.checkpoint, relevance, method, plan, in_place)
        try:
            _compute(job, using, given, progress)
        except BaseException as error:
            directory.end(stage, "failed", error=str(error) or type(error).__name__)
            raise
    directory.end(stage, "complete", seconds=time.monotonic() - start, n_tests=given.n_tests, plan=_facts(plan))
    return True


def plan_run(
    run: str | os.PathLike[str], *, method: str = "hydra", chunks: str = "auto", memory: str = "4GiB", scheduler: str = "threads"
) -> str:
    """What `reduce_run` would do with the same arguments, in lines for people. Reads metadata only, and raises the same."""
    request = _request(run, method, chunks, memory, scheduler)
    with request.scheduler as using:
        return _described(*request.plan(using.workers))


@dataclass(frozen=True)
class _Request:
    """A reduction that can be: checked options, and a complete recording."""

    directory: RunDirectory
    gradients: Gradients
    n_samples: int
    checkpoint: int
    chunks: tuple[int, int] | None
    memory_bytes: int
    scheduler: Scheduler

    def plan(self, workers: Workers) -> tuple[ReductionInput, ReductionPlan]:
        """What there is to reduce, and how. Raises: BudgetError."""
        given = reduction_input(self.gradients, self.checkpoint, self.n_samples, self.memory_bytes, workers)
        return given, plan_reduction(given, self.chunks)


def _request(run: str | os.PathLike[str], method: str, chunks: str, memory: str, scheduler: str) -> _Request:
    if method not in METHODS:
        raise UsageError(f"--method {method} is unknown: choose one of {', '.join(METHODS)}")
    using = scheduler_of(scheduler)
    wanted_chunks, memory_bytes = parse_chunks(chunks), parse_bytes(memory)
    directory = RunDirectory.open(run)
    recording = directory.require(RECORD, f"hydra-pipe record PIPELINE {directory.path}")
    gradients = Gradients(directory.path / names.GRADIENTS)
    n_samples, checkpoint = recording.count("n_samples"), _last_tests(gradients)
    _check_complete(gradients, recording.count("n_rows"))
    return _Request(directory, gradients, n_samples, checkpoint, wanted_chunks, memory_bytes, using)


def reduction_input(gradients: Gradients, checkpoint: int, n_samples: int, memory_bytes: int, workers: Workers) -> ReductionInput:
    """The sizes that a plan is made from, read off the store's metadata."""
    rows, tests = gradients.rows, gradients.test_rows(checkpoint)
    return ReductionInput(
        n_rows=rows.n_rows,
        n_features=gradients.layout.n_features,
        n_folding=sum(s.columns[1] - s.columns[0] for s in segments_of(gradients.layout) if isinstance(s, DenseSegment)),
        n_samples=n_samples,
        n_tests=tests.n_rows,
        n_columns=tests.n_rows,
        n_steps=gradients.n_steps,
        n_blocks=len(gradients.layout.blocks),
        n_groups=1 + max(block.group for block in gradients.layout.blocks),
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


def _compute(job: Job, using: Scheduler, given: ReductionInput, progress: Progress) -> None:
    with progress.task("reduce", given.n_rows * job.plan.passes, "rows") as task:
        for _, graph in graphs(job, using.counter(task.advance, given.n_rows)):
            using.compute(graph)


def _summary(given: ReductionInput, plan: ReductionPlan) -> str:
    return (
        f"{given.n_rows:,} rows x {given.n_features:,} features, {given.n_tests:,} test samples: {plan.order}, {plan.passes} "
        f"pass{'es' if plan.passes > 1 else ''} of {len(plan.row_runs)} workers, {plan.reading.rows}x{plan.reading.features} "
        f"decoded at once, {format_bytes(plan.read_bytes)} to decode, at most {format_bytes(plan.peak_bytes)} of memory"
        + (f" in each process, {format_bytes(plan.moved_bytes)} between them" if given.processes else "")
    )


def _described(given: ReductionInput, plan: ReductionPlan) -> str:
    """The plan in lines, for people."""
    what = "test samples" if plan.order == "score first" else "samples"
    blocks = plan.test_blocks if plan.order == "score first" else plan.sample_blocks
    lines = {
        "rows x features": f"{given.n_rows:,} x {given.n_features:,} ({given.n_folding:,} of these can be folded)",
        "samples x tests": f"{given.n_samples:,} x {given.n_tests:,}",
        "order": plan.order,
        "passes": f"{plan.passes:,}, of {blocks[0][1] - blocks[0][0]:,} {what} each",
        "tasks": f"{plan.tasks:,}, {len(plan.row_runs)} at once",
        "decoded at once": f"{plan.reading.rows:,} rows x {plan.reading.features:,} features",
        "read": f"{format_bytes(plan.read_bytes)} decoded",
        "written": format_bytes(plan.written_bytes),
        "between workers": f"at most {format_bytes(plan.moved_bytes)}",
        "operations": f"{plan.operations:,} of matrix products, {plan.folded_values:,} values folded",
        "peak memory": f"at most {format_bytes(plan.peak_bytes)}, of {format_bytes(given.memory_bytes)}"
        + (" in each process" if given.processes else ""),
        "time": f"about {format_seconds(plan.picoseconds / 1e12 / len(plan.row_runs))} where benchmarks/RESULTS.md was measured",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def _facts(plan: ReductionPlan) -> dict[str, Any]:
    """What the manifest keeps of a plan."""
    found = asdict(plan) | {"passes": plan.passes, "tasks": plan.tasks, "row_runs": len(plan.row_runs)}
    return found | {"test_blocks": len(plan.test_blocks), "sample_blocks": len(plan.sample_blocks)}


def _last_tests(gradients: Gradients) -> int:
    steps = gradients.test_steps()
    if not steps:
        raise StoreError(
            f"{gradients.path} has no test gradients: call recorder.record_test(...) before recorder.close() and record again"
        )
    return steps[-1]


def _check_complete(gradients: Gradients, n_rows: int) -> None:
    if gradients.rows.n_rows != n_rows:
        raise StoreError(f"{gradients.path} has {gradients.rows.n_rows} rows, {n_rows} were recorded: {ROWS_UNREADABLE}")
    missing = gradients.missing()
    if missing:
        raise StoreError(f"{gradients.path}: {missing[0]}: {ROWS_UNREADABLE}")


def _forget_results(directory: RunDirectory, method: str) -> None:
    """Drop what an earlier reduction led to: rankings of another relevance must not stay behind."""
    if export_stage(method) in directory.stages:
        directory.forget(export_stage(method))
    remove(directory.path / names.RANKINGS / names.rankings_directory(method))
