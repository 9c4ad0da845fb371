"""Checks of options against a method and a run. Impossible requests are refused before any work."""

import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import RunError, UsageError
from hydra_pipe.plan.sums import parse_chunks
from hydra_pipe.reduction.executors import executor_of
from hydra_pipe.reduction.methods import METHODS, method_named
from hydra_pipe.reduction.request import Method, Options, ReductionRequest
from hydra_pipe.reduction.weights import last_rows
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.data.keys import selected
from hydra_pipe.store.data.probes import WhichTests, tested_by
from hydra_pipe.store.data.recording import open_recording
from hydra_pipe.store.data.recording_counts import Counts
from hydra_pipe.store.data.relevance import ResultColumns
from hydra_pipe.store.run.manifest import PRUNED, RunDirectory
from hydra_pipe.store.run.results import BY_LABEL, FULL, GROUPINGS, ITSELF, MEAN
from hydra_pipe.store.run.stages import KEEP, RECORD
from hydra_pipe.types import Span
from hydra_pipe.units import parse_bytes

# methods that each of these options is for; the other methods refuse it
_MEANT_FOR = {
    "--keep-hypergradients": "--method hydra and hydra-fisher",
    "--chunks": "methods that read rows as they come",
    "--tests": "methods with test samples",
    "--by": "methods with test samples",
    "--mean": "methods with test samples",
    "--rank": "--method hydra-fisher and hydra-exact",
    "--top": "methods with test samples that do not train again",
    "--probe": "methods with test samples",
    "--pipeline": "--method hydra-exact",
    "dataset": "--method hydra-exact",
}


def requested(run: str | os.PathLike[str], options: Options) -> ReductionRequest:
    """Check `options` against a run.

    Reads metadata only. For methods of the last rows it also reads the sample and step of each row.

    Raises:
        RunError, StoreError, UsageError: the same as in `hydra_pipe.reduce`.
    """
    method = method_named(options.method)
    scheduler = executor_of(options.scheduler)
    if options.by is not None and options.by not in GROUPINGS:
        raise UsageError(f"--by {options.by} is unknown: choose label, or --mean")
    parse_chunks(options.chunks)
    parse_bytes(options.memory)
    check_meant(method, *_given(options))
    if method.solvers is None and options.scheduler not in ("threads", "synchronous"):
        raise UsageError(
            f"--scheduler {options.scheduler}: {method.name} trains again, in this process: "
            "leave it out"
        )
    if options.rank is not None:
        _check_rank(options, method)
    if options.top is not None:
        _check_top(options)
    if options.probe is not None:
        _check_test(options, method)
    if options.up_to_step is not None and options.keep_hypergradients:
        raise UsageError(
            "--up-to-step and --keep-hypergradients: choose one, because hypergradients are kept "
            "for all steps"
        )
    directory = RunDirectory.open(run)
    gradients, counts = open_recording(directory, options.up_to_step)
    if method.of_tests and options.probe is None:
        counts.require_tests(directory.path)
    if directory.stages[RECORD].facts.get(PRUNED):
        _check_pruned(directory, options, method)
    tested, n_tests = tested_by(
        directory, gradients, counts.checkpoint, counts.n_tests, options.probe
    )
    checkpoints = _checkpoints(gradients, counts) if method.on_the_way else (counts.checkpoint,)
    last = last_rows(gradients, counts.n_samples) if method.rows.last else None
    if last is not None and not last.size:
        raise RunError(
            f"{directory.path}: no step has rows, so --method {options.method} has nothing to "
            "compute from"
        )
    spans: tuple[Span, ...] = ((0, n_tests),)
    if options.tests is not None:
        spans = selected(options.tests, n_tests, tested.keys(gradients))
    columns, groups = ResultColumns((), ITSELF, (ITSELF,)), None
    if method.of_tests:
        columns, groups = _grouped(ResultColumns(spans), gradients, tested, options.by)
    found = (counts.n_samples, method, tested, checkpoints, columns, groups, last)
    request = ReductionRequest(directory, gradients, *found, options, scheduler)
    if request.has_kept and method.check_kept is not None:
        method.check_kept(request)
    return request


def check_meant(method: Method, *given: str) -> None:
    """Refuse options that mean nothing to the method. Raises: UsageError."""
    for option in given:
        if option in method.refuses:
            raise UsageError(
                f"{option} is for {_MEANT_FOR[option]}: {method.name} {method.refuses[option]}"
            )


def _given(options: Options) -> Iterator[str]:
    """Yield the given options that not every method has."""
    if options.keep_hypergradients:
        yield "--keep-hypergradients"
    if options.chunks != "auto":
        yield "--chunks"
    if options.tests is not None:
        yield "--tests"
    if options.by is not None:
        yield {BY_LABEL: "--by", MEAN: "--mean"}[options.by]
    if options.rank is not None:
        yield "--rank"
    if options.probe is not None:
        yield "--probe"
    if options.top is not None:
        yield "--top"


def _check_rank(options: Options, method: Method) -> None:
    if options.keep_hypergradients:
        raise UsageError(
            "--rank and --keep-hypergradients: choose one, because hypergradients are kept in all "
            "features"
        )
    if isinstance(options.rank, int) and options.rank < 1:
        raise UsageError(f"--rank {options.rank}: give 1 or more")
    if method.solvers is not None:
        return
    if options.by is not None:
        raise UsageError(f"--rank: means by {options.by} are few columns already: leave it out")
    if options.rank == FULL:
        raise UsageError(f"--rank full: {method.name} replays all directions: leave it out")


def _check_top(options: Options) -> None:
    if options.top is not None and options.top < 1:
        raise UsageError(f"--top {options.top}: give 1 or more")
    if options.keep_hypergradients:
        raise UsageError(
            "--top and --keep-hypergradients: choose one. Hypergradients that an earlier reduce "
            "has kept answer --top too"
        )


def _check_test(options: Options, method: Method) -> None:
    if method.on_the_way:
        raise UsageError(
            f"--probe {options.probe}: {method.name} needs test gradients on the way, and a probe "
            "has those at the end of training only: choose another method, such as grad-dot"
        )
    if options.up_to_step is not None:
        raise UsageError(
            f"--probe {options.probe} and --up-to-step: choose one: a probe's gradients were "
            "taken at "
            "the end of training, not after "
            f"{options.up_to_step} steps"
        )


def _check_pruned(directory: RunDirectory, options: Options, method: Method) -> None:
    """Refuse a request that needs the pruned rows. Raises: RunError."""
    kept = [
        name
        for name in directory.complete(KEEP)
        if name in METHODS and METHODS[name].check_kept is not None
    ]
    if method.name not in kept and method.solvers is not None:
        able = ", ".join(kept) or "none"
        raise RunError(
            f"{directory.path}: its gradients were pruned: only {able} and hydra-exact work "
            "without them"
        )
    if options.keep_hypergradients:
        raise RunError(
            f"{directory.path}: its gradients were pruned, and its hypergradients are kept "
            "already: leave out --keep-hypergradients"
        )


def _checkpoints(gradients: Gradients, counts: Counts) -> tuple[int, ...]:
    """Return the steps after which test gradients were taken, up to the last one that counts.

    Raises:
        UsageError: the number of test samples differs between steps.
    """
    steps = [step for step in gradients.test_steps() if step <= counts.checkpoint]
    for step in steps:
        n_tests = gradients.test_rows(step).n_rows
        if n_tests != counts.n_tests:
            raise UsageError(
                f"{gradients.path} has {n_tests} test gradients after {step} steps and "
                f"{counts.n_tests} after {counts.checkpoint}: --method tracin needs the same test "
                "samples at each of these steps: choose another method, or record with the same "
                "tests"
            )
    return tuple(steps)


def _grouped(
    columns: ResultColumns, gradients: Gradients, tested: WhichTests, by: str | None
) -> tuple[ResultColumns, NDArray[np.int64] | None]:
    if by is None:
        return columns, None
    if by != BY_LABEL:
        return ResultColumns(columns.tests, by, ("mean",)), np.zeros(columns.n_tests, np.int64)
    labels = columns.labels(tested.labels(gradients))
    if labels is None:
        path, how = gradients.path, "record with recorder.record_test(..., labels=...)"
        if tested.probe is not None:
            path, how = tested.probe, "give them to hydra_pipe.probe(..., labels=...)"
        raise UsageError(
            f"--by label: {path} has no labels of test samples: take the mean of all with "
            f"--mean, or {how}"
        )
    unique, groups = np.unique(labels, return_inverse=True)
    return ResultColumns(columns.tests, by, tuple(unique.tolist())), groups.astype(np.int64)
