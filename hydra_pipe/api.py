"""The public functions that work on a whole run: record, reduce, plan, verify, prune."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_pipe.errors import PipelineError, UsageError
from hydra_pipe.progress import Progress
from hydra_pipe.store.files import location
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DEFAULT_METHOD

if TYPE_CHECKING:
    from hydra_pipe.reduction.run import ReductionPlan
    from hydra_pipe.store.integrity.faults import Fault
    from hydra_pipe.store.run.results import Rank
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
    seeds: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Train `pipeline` and record each step's per-sample gradients, then the final test gradients.

    After an interruption the same call resumes at the last checkpoint, and writes the same
    bytes. SIGINT and SIGTERM end the recording after a few more steps, with a checkpoint. A
    second signal ends it at once.

    The first test samples are tried before training. If others fail after training, a
    `RecordWarning` says so, and the recording is complete without test gradients. `probe` can
    take some later.

    Args:
        pipeline: "path/to/file.py", "path/to/file.py:function", or a Pipeline, which is trained
            in place.
        run: directory of the run.
        settings: settings of the pipeline function, as a mapping of values or as "KEY=VALUE"
            strings.
        encoding, dim, dtype: options of `Recorder`.
        checkpoint_every: steps, such as "500", or a time, such as "10min", between checkpoints.
            Default: a minute, or more if checkpoints take long, so that they take at most 2.5 %
            of the time.
        test_every: "epoch", or steps, such as "500", between further test gradients. With these,
            `reduce(..., up_to_step=STEP)` answers for the first steps, even while training goes on.
        seeds: number of runs to record, for `combine`. Run number k is the pipeline function with
            seed=k, in the directory `run`/seed-k. Default: one run, in `run`.
        overwrite: discard an existing recording, and everything computed from it.
        progress: place to show progress. Default: nowhere.

    Returns:
        False if `run` holds this very recording already, or all of them, so that there was nothing
        to do.

    Raises:
        InterruptedRunError: a signal asked to stop.
        HydraError: recording failed. The message tells the reason and the way out.
    """
    # Torch takes seconds to import, and the functions that work from disk alone do without it.
    from hydra_pipe.loading import built_pipeline
    from hydra_pipe.training.run import RecordOptions, record_run

    place, progress = location(run), progress or Progress()
    options = RecordOptions.parse(
        encoding, dim, dtype, checkpoint_every, test_every, overwrite=overwrite
    )
    worked = False
    for own_place, own_settings in _runs_of(place, pipeline, settings, seeds):
        built, own = built_pipeline(pipeline, own_settings)
        worked = record_run(built, own_place, own, options, progress) or worked
    return worked


def _runs_of(
    run: Path,
    pipeline: "str | Pipeline",
    settings: Mapping[str, Any] | list[str] | None,
    seeds: int | None,
) -> list[tuple[Path, Mapping[str, Any] | list[str] | None]]:
    """Return the directory and the settings of each run to record.

    Raises:
        UsageError: `seeds` is impossible, or a seed is set besides.
        PipelineError: a Pipeline was given, which has one seed.
    """
    if seeds is None:
        return [(run, settings)]
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: give 1 or more")
    if not isinstance(pipeline, str):
        raise PipelineError(
            "seeds are for a pipeline file, whose function is called with each seed, and a "
            "Pipeline was given: record it with a seed at a time"
        )
    given = settings or {}
    names = given if isinstance(given, Mapping) else [word.partition("=")[0] for word in given]
    if "seed" in names:
        raise UsageError("--seeds and --set seed: choose one of them")
    return [
        (
            run / f"seed-{seed}",
            {**given, "seed": seed} if isinstance(given, Mapping) else [*given, f"seed={seed}"],
        )
        for seed in range(seeds)
    ]


def reduce(
    run: PathLike,
    *,
    method: str = DEFAULT_METHOD,
    chunks: str = "auto",
    memory: str = "4GiB",
    scheduler: str = "threads",
    tests: str | None = None,
    by: str | None = None,
    keep_hypergradients: bool = False,
    up_to_step: int | None = None,
    rank: "Rank | None" = None,
    probe: str | None = None,
    top: int | None = None,
    pipeline: "str | Pipeline | None" = None,
    dataset: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Compute the relevance of every training sample for the test samples of a recorded run.

    After an interruption the same call resumes: finished parts are not computed again.

    Args:
        run: directory of the run.
        method: "hydra-fisher", "hydra", "hydra-exact" (which trains again), "tracin",
            "grad-dot", "grad-cos", "influence" or "self" (docs/methods.md).
        chunks: rows and features to decode at once, "ROWSxFEATURES", or "auto". Both are rounded
            up to whole stored chunks; "hydra-fisher" decodes whole rows.
        memory: budget for the whole process, such as "4GiB". With worker processes, the budget
            is for each.
        scheduler: "threads" for a thread on each core; "processes" for a process on each core;
            "synchronous" for one thread; or the address of a Dask scheduler, such as
            "tcp://host:8786" (docs/cluster.md). "processes" starts and stops its processes. They
            import the script, so a script calls this below `if __name__ == "__main__":`.
        tests: ids of some test samples, such as "0-99,150". Default: all.
        by: "label" for the mean over the test samples of each label, or "mean" for the mean over
            all. Default: each test sample by itself. Means are results of their own, named
            "hydra-fisher-by-label" and "hydra-fisher-mean".
        keep_hypergradients: for "hydra" and "hydra-fisher": True to also keep data that later
            answers other test samples without the rows, which `prune` may then delete. "hydra"
            keeps weighted sums of rows by sample. "hydra-fisher" keeps the matrix (sample,
            feature) from a sweep of every feature, at the cost of as many test samples.
        up_to_step: number of steps to cover, after which test gradients were taken (`record
            --test-every`), as if training had ended there. A recording that is still running, or
            was interrupted, serves too. A result of its own: "hydra-fisher-upto-120".
        rank: for "hydra-fisher": number of columns that the sweep carries, or "full" for all
            features. Default: 512 to 16,384, more if there are fewer rows; all features if twice
            as many columns hold them. For "hydra-exact": number of directions of the test
            gradients to replay. "hydra-fisher" answers for the rest. A result of its own:
            "hydra-exact-rank-20".
        probe: name of a probe (`hydra_pipe.probe`), whose samples replace the run's own test
            samples. A
            result of its own: "hydra-fisher-of-wrong".
        top: number of training samples to keep on each side, helpful and harmful, of each test
            sample. Default: every pair is kept. For results that are larger than the disk. A
            result of its own: "hydra-fisher-top".
        pipeline: for "hydra-exact": "path/to/file.py:function" if the file has moved, or a newly
            built Pipeline if such an object was recorded.
        dataset: for "hydra-exact" of a probe whose dataset was given as an object: the same
            dataset again.
        overwrite: compute an existing result again, and discard its exports.
        progress: place to show progress. Default: nowhere.

    Returns:
        True if there was anything to do, else False.

    Raises:
        RunError: there is no run, its recording is not complete, or training it again comes out
            differently.
        StoreError: the recording is damaged.
        BudgetError: the budget is too small.
        UsageError: an option has an impossible value.
        ClusterError: workers of another machine cannot be reached, cannot do the work, or are
            lost.
        PipelineError, UserCodeError: the pipeline cannot be trained again.
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
        up_to_step=up_to_step,
        rank=rank,
        probe=probe,
        top=top,
    )
    progress = progress or Progress()
    if _trains(options.method, pipeline, dataset):
        from hydra_pipe.replay.run import reduce_exact

        return reduce_exact(run, options, pipeline, dataset, overwrite=overwrite, progress=progress)
    return reduce_request(requested(run, options), overwrite=overwrite, progress=progress)


def plan_reduction(
    run: PathLike,
    *,
    method: str = DEFAULT_METHOD,
    pipeline: "str | Pipeline | None" = None,
    dataset: Any = None,
    **options: Any,
) -> "ReductionPlan":
    """Plan a reduction without carrying it out: `reduce --dry-run` in Python.

    Reads metadata only. For "hydra-exact" it builds the pipeline and tries a step.

    Args:
        run: directory of the run.
        method, pipeline, dataset: same as in `reduce`.
        options: the other options of `reduce`, except `overwrite` and `progress`.

    Returns:
        The plan. `plan.peak_bytes`, `plan.read_bytes` and `plan.passes` are numbers, and
        `print(plan)` gives lines for people.

    Raises:
        HydraError: any error of `reduce`.
    """
    from hydra_pipe.reduction.checks import requested
    from hydra_pipe.reduction.request import Options
    from hydra_pipe.reduction.run import plan_request

    asked = Options(method=method, **options)
    if _trains(method, pipeline, dataset):
        from hydra_pipe.replay.run import plan_exact

        return plan_exact(run, asked, pipeline, dataset)
    return plan_request(requested(run, asked))


def _trains(name: str, pipeline: "str | Pipeline | None", dataset: Any) -> bool:
    """Tell whether the method called `name` trains again.

    Raises:
        UsageError: there is no such method, or a method that does not train is given a pipeline
            or a dataset.
    """
    from hydra_pipe.reduction.checks import check_meant
    from hydra_pipe.reduction.methods import method_named

    method = method_named(name)
    check_meant(
        method,
        *(
            option
            for option, given in (("--pipeline", pipeline), ("dataset", dataset))
            if given is not None
        ),
    )
    return method.solvers is None


def verify(
    run: PathLike, progress: Progress | None = None, *, repair: bool = False
) -> "list[Fault]":
    """Read everything in a run and check files, checksums, counts, and origins of results.

    Args:
        run: directory of the run.
        progress: place to show progress. Default: nowhere.
        repair: True to set the run back to its last good state. Stages with damaged results are
            forgotten, and a damaged recording is marked as failed. All else is kept. `progress`
            is told of each fault, each repair, and the commands that must run again. Files that
            hydra-pipe did not write are moved to `set-aside`, never deleted.

    Returns:
        The faults, empty for a healthy run. With `repair`, the faults after the repair, except
        unfinished stages.

    Raises:
        RunError: there is no run; with `repair` also: another process is writing it.
        StoreError: the run was written in a newer format version.
    """
    from hydra_pipe.store.integrity.repair import repair_path
    from hydra_pipe.store.integrity.verify import check_path

    return (
        repair_path(run, progress or Progress())
        if repair
        else check_path(run, progress or Progress())
    )


def prune(
    run: PathLike, progress: Progress | None = None, *, discard_unfinished: bool = False
) -> int:
    """Delete the recorded rows of a run that keeps its hypergradients.

    See `reduce(..., keep_hypergradients=True)`. Afterwards "hydra" and "hydra-fisher" answer
    test samples from their hypergradients, if theirs are kept. "hydra-exact" still works too,
    because it trains again. Anything that needs the rows themselves no longer works.

    Args:
        run: directory of the run.
        progress: place to show progress. Default: nowhere.
        discard_unfinished: True to discard hypergradients whose keeping was interrupted, if
            others are kept. Only the rows could finish them. False refuses to prune such a run.

    Returns:
        Number of bytes deleted.

    Raises:
        RunError: there is no run, it keeps no hypergradients, or those of a method are
            unfinished.
        StoreError: the kept hypergradients are damaged. Nothing was deleted.
    """
    from hydra_pipe.store.integrity.pruning import prune_rows
    from hydra_pipe.store.integrity.verify import total_bytes

    directory = RunDirectory.open(run)
    with (progress or Progress()).task("check", total_bytes(directory), "bytes") as task:
        return prune_rows(directory, task, discard_unfinished=discard_unfinished)
