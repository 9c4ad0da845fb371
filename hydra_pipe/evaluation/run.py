"""A whole evaluation: retrainings, what they tell of each method, and the files that say so."""

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hydra_pipe.errors import UsageError
from hydra_pipe.evaluation.result import ONE_TEST
from hydra_pipe.plan.selection import Span, parse_selection, write_selection
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.checksums import area_of, seal
from hydra_pipe.store.evaluations import Retrained, read_result, write_array, write_file, write_result
from hydra_pipe.store.files import remove, remove_partials, sync_tree
from hydra_pipe.store.listing import say_unlisted
from hydra_pipe.store.locks import one_writer
from hydra_pipe.store.permission import check_stages
from hydra_pipe.store.run import CHECKSUMS, OF_RECORD, RECORD, RunDirectory, evaluate_stage
from hydra_pipe.units import parse_bytes

if TYPE_CHECKING:
    from hydra_pipe.evaluation.result import Result
    from hydra_pipe.evaluation.subject import Relevance, Subject
    from hydra_pipe.recording.pipeline import Pipeline

LOO, LDS, NOISE, SMOOTHNESS, APPROXIMATION = "loo", "lds", "noise", "smoothness", "approximation"
KINDS = (LOO, LDS, NOISE, SMOOTHNESS, APPROXIMATION)
# Samples that loo leaves out if nobody says which: all, if there are no more.
MOST_LEFT_OUT = 1000
DEFAULT_RETRAININGS = 100
# fact: checksums of the relevance that was scored, by name
_SCORED = "scored"
# options, and the kinds that have them
_OPTIONS = {"samples": (LOO,), "retrainings": (LDS,), "seeds": (LDS,), "methods": (LOO, LDS, NOISE), "left_out": (NOISE,)}


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
        samples: of "loo": which are left out, such as "0-99,150"; if absent the first `MOST_LEFT_OUT`.
        retrainings: of "lds": on how many random halves; if absent `DEFAULT_RETRAININGS`.
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
    given = {"samples": samples, "retrainings": retrainings, "seeds": seeds, "methods": methods, "left_out": left_out}
    _check(kind, given)
    parse_bytes(memory)
    from hydra_pipe.evaluation.subject import Subject  # torch takes seconds to import: what is wrong above is told without it

    progress = progress or Progress()
    directory = RunDirectory.open(run)
    subject = Subject.open(pipeline, directory, settings)
    own: dict[str, Any] = {}
    spans: tuple[Span, ...] = ()
    if kind == LOO:
        spans = ((0, min(subject.n_samples, MOST_LEFT_OUT)),)
        if samples is not None:
            spans = parse_selection(samples, subject.n_samples, "--samples")
        elif subject.n_samples > MOST_LEFT_OUT:
            progress.say(f"the first {MOST_LEFT_OUT:,} of {subject.n_samples:,} samples are left out; --samples chooses others")
        own["samples"] = write_selection(spans)
    elif kind == LDS:
        own |= {"retrainings": retrainings or DEFAULT_RETRAININGS, "seeds": seeds or 1}
        if own["seeds"] > 1:
            subject.check_seeds()
    elif left_out is not None:
        from hydra_pipe.evaluation.noise import parse_left_out

        parse_left_out(left_out)
        own["left_out"] = left_out
    stage = evaluate_stage(kind)
    with one_writer(directory.path, stage):
        directory.refresh()
        scored = {name: found.checksums for name, found in _scored(kind, subject, methods).items()}
        place = directory.path / area_of(stage)
        check_stages(directory.path, stage)
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
        directory.begin(stage, own)
        start = time.monotonic()
        with directory.failing(stage):
            remove_partials(place)
            result = _result(kind, subject, progress, own, spans, methods, memory)
            if any(_lacks_interval(row) for row in result.rows):
                result = replace(result, says=[*result.says, ONE_TEST])
            summary = {"kind": kind, "run_id": directory.run_id} | own | dict(result.summary) | {"says": list(result.says)}
            _write(directory, stage, result, summary, progress)
            sync_tree(place.parent, files=False)
            checksums = seal(directory, stage)
        source = directory.stages[RECORD].facts.get(CHECKSUMS)
        facts = {"seconds": time.monotonic() - start, _SCORED: scored, CHECKSUMS: checksums, OF_RECORD: source}
        directory.end(stage, "complete", **facts)
    return Evaluation(True, list(result.rows), summary)


def _check(kind: str, given: Mapping[str, Any]) -> None:
    """Raises: UsageError."""
    if kind not in KINDS:
        raise UsageError(f"evaluate {kind}: there is no such kind, choose one of {', '.join(KINDS)}")
    for name, value in given.items():
        if value is not None and kind not in _OPTIONS[name]:
            raise UsageError(f"--{name.replace('_', '-')} is no option of evaluate {kind}, but of {', '.join(_OPTIONS[name])}")
    for name, least in (("retrainings", 10), ("seeds", 1)):
        if given[name] is not None and given[name] < least:
            raise UsageError(f"--{name} {given[name]}: give {least} or more")


def _scored(kind: str, subject: "Subject", methods: str | None) -> "Mapping[str, Relevance]":
    """The relevance that an evaluation depends on. Raises: HydraError: something is missing that the kind cannot do without."""
    if kind == SMOOTHNESS:
        return {}
    if kind == APPROXIMATION:
        from hydra_pipe.evaluation.approximation import pairs_of

        return {relevance.name: relevance for pair in pairs_of(subject) for relevance in (pair.approximate, pair.exact)}
    if kind == NOISE:
        from hydra_pipe.evaluation.noise import wrong_labels

        wrong_labels(subject)
        return subject.required_relevance(methods, means=True)
    return subject.relevance(methods) if kind == LOO else subject.required_relevance(methods)


def _result(
    kind: str,
    subject: "Subject",
    progress: Progress,
    own: Mapping[str, Any],
    spans: tuple[Span, ...],
    methods: str | None,
    memory: str,
) -> "Result":
    directory = Retrained(subject.run.path / area_of(evaluate_stage(kind)))
    if kind == LOO:
        from hydra_pipe.evaluation.loo import loo

        return loo(subject, directory, progress, samples=spans, methods=methods, memory=memory)
    if kind == LDS:
        from hydra_pipe.evaluation.lds import lds

        return lds(subject, directory, progress, methods=methods, memory=memory, **own)
    if kind == NOISE:
        from hydra_pipe.evaluation.noise import noise, parse_left_out

        shares = parse_left_out(own.get("left_out"))
        return noise(subject, directory, progress, methods=methods, memory=memory, left_out=shares)
    if kind == SMOOTHNESS:
        from hydra_pipe.evaluation.smoothness import smoothness

        return smoothness(subject, directory, progress, memory=memory)
    from hydra_pipe.evaluation.approximation import approximation

    return approximation(subject)


def _lacks_interval(row: Mapping[str, Any]) -> bool:
    """Tell whether a mean in `row` is of one test sample."""
    bounds = (value for name, value in row.items() if name.endswith("_low"))
    return any(isinstance(value, float) and math.isnan(value) for value in bounds)


def _write(run: RunDirectory, stage: str, result: "Result", summary: Mapping[str, Any], progress: Progress) -> None:
    from hydra_pipe.evaluation.plots import drawn

    place = run.path / area_of(stage)
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
