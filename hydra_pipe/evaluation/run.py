"""A whole evaluation: the retrainings, a score for each method, and the files with the results."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hydra_pipe.evaluation.kinds import Options, kind_of
from hydra_pipe.progress import Progress
from hydra_pipe.retraining.intervals import ONE_TEST
from hydra_pipe.store import names
from hydra_pipe.store.data.evaluations import (
    Retrained,
    read_result,
    write_array,
    write_file,
    write_result,
)
from hydra_pipe.store.files import remove, remove_partials, sync_tree
from hydra_pipe.store.run.listing import say_unlisted
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.permission import check_stages
from hydra_pipe.store.run.stage_runner import alone, running
from hydra_pipe.store.run.stages import EVALUATE, StageId
from hydra_pipe.units import parse_bytes

if TYPE_CHECKING:
    from hydra_pipe.evaluation.result import Result
    from hydra_pipe.training.pipeline import Pipeline

# Fact of the stage: checksums of the relevance that was scored, by name.
_SCORED = "scored"


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Args:
        is_new: False if this very evaluation was there already, so that nothing was done.
        rows: rows of the table.
        summary: findings as plain values. Its `says` holds lines for a person.
    """

    is_new: bool
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def evaluate_run(
    pipeline: "str | Pipeline",
    run: str | os.PathLike[str],
    kind: str,
    *,
    settings: Mapping[str, Any] | list[str] | None = None,
    samples: str | None = None,
    retrainings: int | None = None,
    seeds: int | None = None,
    methods: str | None = None,
    left_out: str | None = None,
    drop: float | None = None,
    tests: str | None = None,
    by: str | None = None,
    memory: str = "4GiB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the relevance of a run with the truth, which is found by training again.

    docs/evaluating.md describes each kind. Results of retrainings are kept as they finish, so
    the same call resumes after an interruption. Relevance that was computed since the last call
    is scored with the retrainings that are there.

    Args:
        pipeline: pipeline of the run: "path/to/file.py", "path/to/file.py:function", or a
            Pipeline as it was before training.
        run: directory of the run.
        kind: "loo", "lds", "qld", "subset", "noise", "smoothness" or "approximation".
        settings: settings of the pipeline function, the same as were recorded.
        samples: for "loo": ids of the samples to leave out, such as "0-99,150". Default: the
            first 1,000.
        retrainings: for "lds": number of random subsets to train on. Default: 100.
        seeds: for "lds" and "qld": number of initial weights and orders for each subset.
            Default: 1.
        methods: for "loo", "lds", "qld", "subset" and "noise": names of relevance arrays with
            commas between them. Default: all that are there.
        left_out: for "noise": numbers of samples to leave out before training again, as shares
            of the number of wrong labels with commas between them, such as "1". "0" trains
            nothing. Default: "0.5,1,2".
        drop: share of the training samples to leave out. For "lds": at random, default 0.5. For
            "qld": the most helpful, and the most harmful, default 0.01. For "subset": the largest
            share to try, default 0.2.
        tests: for "qld" and "subset": ids of the test samples to ask about, such as "0-99,150".
            Default: the first 20, for "subset" the first 20 that are predicted right.
        by: for "qld": "label" to ask about the mean loss of each label's test samples, "mean" for
            the mean loss of all test samples.
        memory: budget of this process.
        overwrite: discard the results that an earlier call of this kind left.
        progress: place to show progress. Default: nowhere.

    Returns:
        The result. It is also in RUN/evaluation/KIND, as `table.parquet`, `summary.json`, and
        `plot.svg` if matplotlib is installed.

    Raises:
        RunError: there is no run, it lacks the relevance, it was evaluated with other settings,
            or it was recorded from another pipeline.
        PipelineError: the pipeline cannot be used, or its test losses differ from those of the
            run.
        UsageError: the kind does not take an option, or a value is not possible.
    """
    options = Options(samples, retrainings, seeds, methods, left_out, drop, tests, by)
    wanted = kind_of(kind)
    wanted.check(options)
    parse_bytes(memory)
    # Torch takes seconds to import. Mistakes that can be found without torch were reported
    # above.
    from hydra_pipe.evaluation.evaluator import EvaluationRequest
    from hydra_pipe.retraining.subject import Subject

    evaluator = wanted.load()
    progress = progress or Progress()
    directory = RunDirectory.open(run)
    subject = Subject.open(pipeline, directory, settings)
    own = evaluator.settings(subject, options, progress)
    stage = EVALUATE.of(kind)
    with alone(directory, stage):
        scored = {
            name: found.checksums for name, found in evaluator.scored(subject, methods, own).items()
        }
        place = directory.path / stage.area
        check_stages(directory.path, stage)  # before anything is discarded
        begun = stage in directory.stages and directory.stages[stage].state != "complete"
        if begun and not Retrained(place).spans():
            directory.forget(stage)  # nothing was finished, so its settings bind nobody
        if overwrite:
            directory.forget(stage)
            remove(place)
        elif (
            not directory.has_work(stage, own)
            and directory.stages[stage].facts.get(_SCORED) == scored
        ):
            with suppress(OSError, ValueError, pa.ArrowException):
                return Evaluation(False, *read_result(place))
        say_unlisted(directory, progress)
        with running(directory, stage, own) as work:
            remove_partials(place)
            result = evaluator.evaluate(
                EvaluationRequest(subject, Retrained(place), own, methods, memory, progress)
            )
            if any(_lacks_interval(row) for row in result.rows):
                result = replace(result, says=[*result.says, ONE_TEST])
            summary = (
                {"kind": kind, "run_id": directory.run_id}
                | own
                | dict(result.summary)
                | {"says": list(result.says)}
            )
            _write(directory, stage, result, summary, progress)
            sync_tree(place.parent, files=False)
            work.facts[_SCORED] = scored
    return Evaluation(True, list(result.rows), summary)


def _lacks_interval(row: Mapping[str, Any]) -> bool:
    """Tell whether a mean in `row` is of one test sample, and so has no interval."""
    bounds = (value for name, value in row.items() if name.endswith("_low"))
    return any(isinstance(value, float) and math.isnan(value) for value in bounds)


def _write(
    run: RunDirectory,
    stage: StageId,
    result: "Result",
    summary: Mapping[str, Any],
    progress: Progress,
) -> None:
    from hydra_pipe.evaluation.plots import drawn

    place = run.path / stage.area
    write_result(place, result.rows, summary)
    remove(place / names.PLOT)
    if result.truth is not None:
        write_array(place / names.TRUTH, result.truth)
    if result.plot is not None:
        picture = drawn(result.plot, f"{stage}, run {run.run_id[:8]}")
        if picture is None:
            progress.say(
                "no plot was drawn, because matplotlib is not installed: pip install "
                "'hydra-pipe[plots]'"
            )
        else:
            write_file(place / names.PLOT, picture)
