"""A whole reduction: check, plan, compute pass by pass, write."""

import os
import time
from dataclasses import asdict
from pathlib import Path

import dask
from threadpoolctl import threadpool_limits

from hydra_pipe.errors import StoreError, UsageError
from hydra_pipe.plan.reduction import BASE_BYTES, OVERHEAD_BYTES, ReductionInput, ReductionPlan, parse_chunks, plan_reduction
from hydra_pipe.progress import Progress
from hydra_pipe.reduction.hydra import Source, StepWeights, relevance_graph, row_weights
from hydra_pipe.store import names
from hydra_pipe.store.files import remove
from hydra_pipe.store.gradients import Gradients
from hydra_pipe.store.relevance import create_relevance
from hydra_pipe.store.rows import ROWS_UNREADABLE
from hydra_pipe.store.run import RECORD, RunDirectory, export_stage, reduce_stage
from hydra_pipe.units import format_bytes, parse_bytes, resident_bytes

METHODS = ("hydra",)
SCHEDULERS = ("threads", "synchronous")


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
        chunks: rows and features to read at once, "ROWSxFEATURES", or "auto".
        memory: budget for the whole process, such as "4GiB".
        scheduler: Dask's "threads", or "synchronous" for one thread.
        overwrite: compute again what is there, and discard what was exported from it.
        progress: where to show progress; nowhere if absent.

    Returns:
        Whether there was anything to do.

    Raises:
        RunError: there is no run, or it is not recorded to the end.
        StoreError: the recording is damaged.
        BudgetError: the budget is too small.
        UsageError: an option that cannot be.
    """
    if method not in METHODS:
        raise UsageError(f"--method {method} is unknown: choose one of {', '.join(METHODS)}")
    if scheduler not in SCHEDULERS:
        raise UsageError(f"--scheduler {scheduler} is unknown: choose one of {', '.join(SCHEDULERS)}")
    wanted_chunks, memory_bytes = parse_chunks(chunks), parse_bytes(memory)
    progress = progress or Progress()

    directory = RunDirectory.open(run)
    recording = directory.require(RECORD, f"hydra-pipe record PIPELINE {directory.path}")
    gradients = Gradients(directory.path / names.GRADIENTS)
    n_samples = recording.count("n_samples")
    checkpoint = _last_tests(gradients)
    _check_complete(gradients, recording.count("n_rows"))
    stage, settings = reduce_stage(method), {"checkpoint": checkpoint}
    if not overwrite and not directory.has_work(stage, settings):
        return False

    given = reduction_input(gradients, checkpoint, n_samples, memory_bytes, _workers(scheduler))
    plan = plan_reduction(given, wanted_chunks)
    _forget_results(directory, method)
    directory.begin(stage, settings)
    start = time.monotonic()
    relevance = directory.path / names.RELEVANCE
    tests_at_once = plan.test_blocks[0][1]
    create_relevance(relevance, method, (n_samples, given.n_tests), tests_at_once, directory.run_id)
    progress.say(_describe(given, plan))
    source = Source(gradients.path, checkpoint, n_samples)
    try:
        weights = row_weights(gradients)
        _compute(source, weights, plan, relevance, method, scheduler, given, progress)
    except BaseException as error:
        directory.end(stage, "failed", error=str(error) or type(error).__name__)
        raise
    directory.end(
        stage,
        "complete",
        seconds=time.monotonic() - start,
        n_tests=given.n_tests,
        plan=asdict(plan) | {"test_blocks": len(plan.test_blocks), "row_runs": len(plan.row_runs)},
    )
    return True


def reduction_input(gradients: Gradients, checkpoint: int, n_samples: int, memory_bytes: int, workers: int) -> ReductionInput:
    """The sizes that a plan is made from, read off the store's metadata."""
    rows, tests = gradients.rows, gradients.test_rows(checkpoint)
    return ReductionInput(
        n_rows=rows.n_rows,
        n_features=gradients.layout.n_features,
        n_samples=n_samples,
        n_tests=tests.n_rows,
        n_steps=gradients.n_steps,
        n_blocks=len(gradients.layout.blocks),
        n_groups=1 + max(block.group for block in gradients.layout.blocks),
        item_bytes=rows.dtype.itemsize,
        test_item_bytes=tests.dtype.itemsize,
        shard_rows=rows.shard_rows,
        chunk_rows=rows.chunk_rows,
        chunk_features=rows.chunk_features,
        memory_bytes=memory_bytes,
        workers=workers,
        base_bytes=max(BASE_BYTES, resident_bytes() + OVERHEAD_BYTES),
        part_rows=rows.part_rows,
    )


def _compute(
    source: Source,
    weights: StepWeights,
    plan: ReductionPlan,
    relevance: Path,
    method: str,
    scheduler: str,
    given: ReductionInput,
    progress: Progress,
) -> None:
    total = given.n_rows * len(plan.test_blocks)
    # The workers are the parallelism: BLAS threads of their own would only fight over the same cores.
    with progress.task("reduce", total, "rows") as task, threadpool_limits(1, user_api="blas"):
        for tests in plan.test_blocks:
            graph = relevance_graph(source, plan, tests, weights, relevance, method, task.advance)
            dask.compute(graph, scheduler=scheduler, num_workers=given.workers)


def _describe(given: ReductionInput, plan: ReductionPlan) -> str:
    passes = len(plan.test_blocks)
    return (
        f"{given.n_rows:,} rows x {given.n_features:,} features, {given.n_tests:,} test samples: {passes} "
        f"pass{'es' if passes > 1 else ''} of {len(plan.row_runs)} workers, "
        f"{plan.reading.read_rows}x{plan.reading.read_features} read at once, {format_bytes(plan.read_bytes)} to decode, "
        f"at most {format_bytes(plan.peak_bytes)} of memory"
    )


def _workers(scheduler: str) -> int:
    return len(os.sched_getaffinity(0)) if scheduler == "threads" else 1


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
