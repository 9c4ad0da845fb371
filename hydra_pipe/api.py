"""What a user calls beside `exporting.run.export_run`."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra_pipe.progress import Progress
from hydra_pipe.store.files import location
from hydra_pipe.store.run import RunDirectory

if TYPE_CHECKING:
    from hydra_pipe.store.fault import Fault
    from hydra_pipe.training.pipeline import Pipeline

PathLike = str | os.PathLike[str]


def record(
    pipeline: "str | Pipeline",
    run: PathLike,
    *,
    settings: Mapping[str, Any] | list[str] | None = None,
    encoding: str = "auto",
    dim: int = 4096,
    dtype: str | None = None,
    checkpoint_every: str | None = None,
    test_every: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Train `pipeline` and record every step's per-sample gradients, then the test gradients at the end.

    Where it was interrupted or killed the same call goes on from the last checkpoint, to the same bytes. SIGINT and SIGTERM end it
    after a few steps more, with a checkpoint; a second one at once. The first test samples are tried before training. Where others
    fail after it, a `RecordWarning` says so, and the recording is complete without test gradients: `probe` takes some.

    Args:
        pipeline: "path/to/file.py", "path/to/file.py:function", or a Pipeline, which is trained in place.
        run: directory of the run.
        settings: of the pipeline function, as a mapping of values or as "KEY=VALUE" strings.
        encoding, dim, dtype: see `Recorder`.
        checkpoint_every: steps, such as "500", or a time, such as "10min", between checkpoints; if absent a minute, or more where
            they take long: at most 2.5 % of the time.
        test_every: "epoch", or steps, such as "500": also take test gradients on the way, so that `reduce(..., upto=STEP)` answers
            for the first steps, while training goes on too.
        overwrite: discard a recording that is there, and what was computed from it.
        progress: where to show progress; nowhere if absent.

    Returns:
        Whether there was anything to do: False where `run` holds this very recording already.

    Raises:
        InterruptedRunError: a signal asked to stop.
        HydraError: one of its kinds; the message says what is wrong and what to do.
    """
    # torch takes seconds to import: what works from disk alone does without it
    from hydra_pipe.loading import built_pipeline
    from hydra_pipe.training.run import RecordOptions, record_run

    run = location(run)
    options = RecordOptions.parse(encoding, dim, dtype, checkpoint_every, test_every, overwrite=overwrite)
    built, own = built_pipeline(pipeline, settings)
    return record_run(built, run, own, options, progress or Progress())


def reduce(
    run: PathLike,
    *,
    method: str = "hydra",
    chunks: str = "auto",
    memory: str = "4GiB",
    scheduler: str = "threads",
    tests: str | None = None,
    by: str | None = None,
    keep_hypergradients: bool = False,
    upto: int | None = None,
    rank: int | None = None,
    test: str | None = None,
    pipeline: "str | Pipeline | None" = None,
    dataset: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Compute the relevance of every training sample for the test samples of a recorded run.

    Where it was interrupted the same call goes on: what is done is not done again.

    Args:
        run: directory of the run.
        method: "hydra", "hydra-fisher", "hydra-exact" (which trains again), "tracin", "grad-dot", "grad-cos", "influence" or "self"
            (docs/methods.md).
        chunks: rows and features to decode at once, "ROWSxFEATURES", or "auto".
        memory: budget for the whole process, such as "4GiB"; for each worker process where there are such.
        scheduler: "threads", a thread for each core; "processes", a process for each core, which are started and stopped (from a
            script: call this below `if __name__ == "__main__":`, for they import it); the address of a Dask scheduler, such as
            "tcp://host:8786", see docs/cluster.md; or "synchronous" for one thread.
        tests: some of the test samples, such as "0-99,150"; all if absent.
        by: "label" for the mean over the test samples of each label, "mean" for that over all, instead of each test sample.
            These are results of their own, named "hydra-by-label" and "hydra-mean".
        keep_hypergradients: of "hydra" and "hydra-fisher": also keep what answers other test samples later without the rows,
            which `prune` may then delete: weighted sums of rows by sample, or the matrix (sample, feature) that a sweep of every
            feature gives, at the cost of as many test samples.
        upto: only the first so many steps, after which test gradients were taken (`record --test-every`), as if training had
            ended there; also of a recording that goes on meanwhile, or was interrupted. A result of its own: "hydra-upto-120".
        rank: for "hydra-exact": replay only so many directions of the test gradients, and leave the rest to "hydra-fisher".
            A result of its own: "hydra-exact-rank-20".
        test: the samples of this probe (`probe`) instead of the run's own test samples. A result of its own: "hydra-of-wrong".
        pipeline: for "hydra-exact": "path/to/file.py:function" where the file has moved; a newly built Pipeline where such an
            object was recorded.
        dataset: for "hydra-exact" of a probe whose dataset was given as an object: that again.
        overwrite: compute again what is there, and discard what was exported from it.
        progress: where to show progress; nowhere if absent.

    Returns:
        Whether there was anything to do.

    Raises:
        RunError: there is no run, it is not recorded to the end, or training it again does not come out the same.
        StoreError: the recording is damaged.
        BudgetError: the budget is too small.
        UsageError: an option that cannot be.
        ClusterError: workers of another machine cannot be reached, cannot do this, or are lost.
        PipelineError, UserCodeError: of the pipeline that is trained again.
    """
    from hydra_pipe.reduction.checks import requested
    from hydra_pipe.reduction.request import Options
    from hydra_pipe.reduction.run import reduce_request

    options = Options(
        method=method,
        chunks=chunks,
        memory=memory,
        scheduler=scheduler,
        tests=tests,
        by=by,
        keep_hypergradients=keep_hypergradients,
        upto=upto,
        rank=rank,
        test=test,
    )
    progress = progress or Progress()
    if _trains(options.method, pipeline, dataset):
        from hydra_pipe.replay.run import reduce_exact

        return reduce_exact(run, options, pipeline, dataset, overwrite=overwrite, progress=progress)
    return reduce_request(requested(run, options), overwrite=overwrite, progress=progress)


def plan(
    run: PathLike, *, method: str = "hydra", pipeline: "str | Pipeline | None" = None, dataset: Any = None, **options: Any
) -> str:
    """What `reduce` would do with these arguments, in lines for people. Reads metadata only; for "hydra-exact" it builds the
    pipeline and tries a step. Raises the same."""
    from hydra_pipe.reduction.checks import requested
    from hydra_pipe.reduction.request import Options
    from hydra_pipe.reduction.run import plan_request

    asked = Options(method=method, **options)
    if _trains(method, pipeline, dataset):
        from hydra_pipe.replay.run import plan_exact

        return plan_exact(run, asked, pipeline, dataset)
    return plan_request(requested(run, asked))


def _trains(name: str, pipeline: "str | Pipeline | None", dataset: Any) -> bool:
    """Whether the method called `name` trains again.

    Raises:
        UsageError: there is no such method, or the method does not train and is given what to train.
    """
    from hydra_pipe.reduction.checks import check_meant
    from hydra_pipe.reduction.methods import method_named

    method = method_named(name)
    check_meant(method, *(option for option, given in (("--pipeline", pipeline), ("dataset", dataset)) if given is not None))
    return method.solvers is None


def verify(run: PathLike, progress: Progress | None = None, *, repair: bool = False) -> "list[Fault]":
    """Read everything in a run and hold it against what was written: files, checksums, counts, and what came from what.

    Args:
        run: directory of the run.
        progress: where to show progress; nowhere if absent.
        repair: set the run back to its last good state. Stages whose results are damaged are forgotten, a recording is marked as
            failed, and the rest is kept; `progress` is told of each fault, of what was done and which command must run again. What
            hydra-pipe has not written is moved to `set-aside`, never deleted.

    Returns:
        What is off; empty for a healthy run. With `repair`, what is off after it, unfinished stages aside.

    Raises:
        RunError: there is no run; with `repair` also: a process writes it. StoreError: it was written in a newer format version.
    """
    from hydra_pipe.store.repair import repair_path
    from hydra_pipe.store.verify import check_path

    return repair_path(run, progress or Progress()) if repair else check_path(run, progress or Progress())


def prune(run: PathLike, progress: Progress | None = None, *, discard_unfinished: bool = False) -> int:
    """Delete the recorded rows of a run whose hypergradients are kept (`reduce(..., keep_hypergradients=True)`).

    Test samples are answered from the hypergradients afterwards, by the methods whose own are kept ("hydra", "hydra-fisher"), and
    by "hydra-exact", which trains again; what needs the rows themselves no longer works.

    Args:
        run: directory of the run.
        progress: where to show progress; nowhere if absent.
        discard_unfinished: where the keeping of some hypergradients was interrupted, which only the rows could finish, and others
            are kept: discard what there is of the former. Otherwise that is refused.

    Returns:
        Bytes that were deleted.

    Raises:
        RunError: there is no run, or it keeps no hypergradients, or those of a method not to the end.
        StoreError: what it keeps is damaged: nothing was deleted.
    """
    from hydra_pipe.store.pruning import prune_rows
    from hydra_pipe.store.verify import total_bytes

    directory = RunDirectory.open(run)
    with (progress or Progress()).task("check", total_bytes(directory), "bytes") as task:
        return prune_rows(directory, task, discard_unfinished=discard_unfinished)
