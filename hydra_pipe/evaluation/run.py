"""A whole evaluation: retrainings, what they tell of each method, and the files that say so."""

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
from hydra_pipe.store.evaluations import Retrained, read_result, write_array, write_file, write_result
from hydra_pipe.store.files import remove, remove_partials, sync_tree
from hydra_pipe.store.listing import say_unlisted
from hydra_pipe.store.permission import check_stages
from hydra_pipe.store.run import RunDirectory
from hydra_pipe.store.stage_runner import alone, running
from hydra_pipe.store.stages import EVALUATE, StageId
from hydra_pipe.units import parse_bytes

if TYPE_CHECKING:
    from hydra_pipe.evaluation.result import Result
    from hydra_pipe.training.pipeline import Pipeline

# fact: checksums of the relevance that was scored, by name
_SCORED = "scored"


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Args:
        is_new: whether there was anything to do: False where this very evaluation was there already.
        rows: of the table.
        summary: plain values, `says` among them: lines for a person.
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
    memory: str = "4GiB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Hold the relevance of a run against the truth, which is found by training again. docs/evaluating.md tells of each kind.

    Results of retrainings are kept as they finish: killed and called again it goes on. Where relevance was computed since, it is
    scored with the retrainings that are there.

    Args:
        pipeline: of the run: "path/to/file.py", "path/to/file.py:function", or a Pipeline as it was before training.
        run: directory of the run.
        kind: "loo", "lds", "noise", "smoothness" or "approximation".
        settings: of the pipeline function, those that were recorded.
        samples: of "loo": which are left out, such as "0-99,150"; if absent the first 1,000.
        retrainings: of "lds": on how many random halves; if absent 100.
        seeds: of "lds": initial weights and orders that each half is trained from; if absent 1.
        methods: of "loo", "lds" and "noise": names of relevance arrays with commas between them; if absent all that are there.
        left_out: of "noise": how many samples are left out before training again, as shares of the number of wrong labels with
            commas between them, such as "1"; "0": nothing is trained; if absent "0.5,1,2".
        memory: budget of this process.
        overwrite: discard what an earlier call of this kind left.
        progress: where to show progress; nowhere if absent.

    Returns:
        What was found. It is also in RUN/evaluation/KIND: `table.parquet`, `summary.json`, and `plot.svg` where matplotlib is
        installed.

    Raises:
        RunError: there is no run, it lacks the relevance, it was evaluated with other settings, or the pipeline is not its own.
        PipelineError: the pipeline cannot be used, or comes to other test losses than the run.
        UsageError: an option that the kind does not have, or a value that cannot be.
    """
    options = Options(samples, retrainings, seeds, methods, left_out)
    wanted = kind_of(kind)
    wanted.check(options)
    parse_bytes(memory)
    # torch takes seconds to import: whatever is wrong so far is said without torch
    from hydra_pipe.evaluation.evaluator import Request
    from hydra_pipe.retraining.subject import Subject

    evaluator = wanted.load()
    progress = progress or Progress()
    directory = RunDirectory.open(run)
    subject = Subject.open(pipeline, directory, settings)
    own = evaluator.settings(subject, options, progress)
    stage = EVALUATE.of(kind)
    with alone(directory, stage):
        scored = {name: found.checksums for name, found in evaluator.scored(subject, methods).items()}
        place = directory.path / stage.area
        check_stages(directory.path, stage)  # before anything is discarded
        begun = stage in directory.stages and directory.stages[stage].state != "complete"
        if begun and not Retrained(place).spans():
            directory.forget(stage)  # it has come to nothing: its settings bind nobody
        if overwrite:
            directory.forget(stage)
            remove(place)
        elif not directory.has_work(stage, own) and directory.stages[stage].facts.get(_SCORED) == scored:
            with suppress(OSError, ValueError, pa.ArrowException):
                return Evaluation(False, *read_result(place))
        say_unlisted(directory, progress)
        with running(directory, stage, own) as work:
            remove_partials(place)
            result = evaluator.evaluate(Request(subject, Retrained(place), own, methods, memory, progress))
            if any(_lacks_interval(row) for row in result.rows):
                result = replace(result, says=[*result.says, ONE_TEST])
            summary = {"kind": kind, "run_id": directory.run_id} | own | dict(result.summary) | {"says": list(result.says)}
            _write(directory, stage, result, summary, progress)
            sync_tree(place.parent, files=False)
            work.facts[_SCORED] = scored
    return Evaluation(True, list(result.rows), summary)


def _lacks_interval(row: Mapping[str, Any]) -> bool:
    """Tell whether a mean in `row` is of one test sample."""
    bounds = (value for name, value in row.items() if name.endswith("_low"))
    return any(isinstance(value, float) and math.isnan(value) for value in bounds)


def _write(run: RunDirectory, stage: StageId, result: "Result", summary: Mapping[str, Any], progress: Progress) -> None:
    from hydra_pipe.evaluation.plots import drawn

    place = run.path / stage.area
    write_result(place, result.rows, summary)
    remove(place / names.PLOT)
    if result.truth is not None:
        write_array(place / names.TRUTH, result.truth)
    if result.plot is not None:
        picture = drawn(result.plot, f"{stage}, run {run.run_id[:8]}")
        if picture is None:
            progress.say("no plot was drawn: it needs matplotlib, pip install 'hydra-pipe[plots]'")
        else:
            write_file(place / names.PLOT, picture)
