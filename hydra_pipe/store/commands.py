"""The commands that make the stages of a run, as they were given."""

import shlex

from hydra_pipe.store import names
from hydra_pipe.store.relevance import BY_LABEL, MEAN, parts_of_result, result_name
from hydra_pipe.store.run import (
    RECORD,
    UPTO,
    RunDirectory,
    Settings,
    clean_stage,
    evaluate_stage,
    export_stage,
    keep_stage,
    probe_stage,
    reduce_stage,
    report_stage,
)

# setting of a probe: FILE:FUNCTION of its dataset, or null
DATASET = "dataset"
# that needs no option
_DEFAULT = "hydra"


def command_of(run: RunDirectory, stage: str) -> str:
    """The command that makes `stage` again, with the settings that it had."""
    settings = run.stages[stage].settings if stage in run.stages else {}
    if stage == RECORD:
        return _record(run, settings)
    if stage.startswith(keep_stage("")):
        return f"{command_of(run, kept_with(run, stage))} --keep-hypergradients"
    if stage.startswith(reduce_stage("")):
        parts = parts_of_result(stage.removeprefix(reduce_stage("")))
        flags = ["--by", "label"] if parts.by == BY_LABEL else ["--mean"] if parts.by == MEAN else []
        options = {"--tests": settings.get(names.TESTS), "--upto": settings.get(UPTO), "--rank": parts.rank}
        options |= {"--test": parts.test, "--method": None if parts.method == _DEFAULT else parts.method}
        return _command("reduce", str(run.path), *flags, **options)
    if stage.startswith(probe_stage("")):
        dataset = str(settings.get(DATASET) or "FILE.py:FUNCTION")
        name = {"--name": stage.removeprefix(probe_stage(""))}
        return _command("probe", str(run.path), dataset, *_assignments(settings), **name)
    if stage.startswith(evaluate_stage("")):
        return _evaluate(run, stage.removeprefix(evaluate_stage("")), settings)
    if stage.startswith(clean_stage("")):
        method = stage.removeprefix(clean_stage(""))
        return _command("clean", str(run.path), **{"--method": method}, **_cut(settings))
    if stage.startswith(report_stage("")):
        options = {"--tests": settings.get(names.TESTS), "--top": settings.get("top")}
        return _command("report", str(run.path), **{"--method": stage.removeprefix(report_stage(""))}, **options)
    method = stage.removeprefix(export_stage(""))
    full = ["--full"] if settings.get("full") else []
    return _command("export", str(run.path), *full, **{"--method": method, "--top": settings.get("top")})


def kept_with(run: RunDirectory, stage: str) -> str:
    """The reduction that `stage` keeps hypergradients with: one of all steps that is there, or that of all test samples."""
    able = [reduce_stage(result_name(stage.removeprefix(keep_stage("")), by)) for by in (None, BY_LABEL, MEAN)]
    return next((name for name in run.stages if name in able), able[0])


def _record(run: RunDirectory, settings: Settings) -> str:
    options = {f"--{name}": settings.get(name) for name in ("encoding", "dim", "dtype")}
    return _command("record", _pipeline(settings), str(run.path), *_assignments(settings), **options)


def _evaluate(run: RunDirectory, kind: str, settings: Settings) -> str:
    recorded = run.stages[RECORD].settings if RECORD in run.stages else {}
    options = {f"--{name}": settings.get(name) for name in ("samples", "retrainings", "seeds")}
    options["--left-out"] = settings.get("left_out")
    return _command("evaluate", _pipeline(recorded), str(run.path), kind, *_assignments(recorded), **options)


def _cut(settings: Settings) -> Settings:
    return {f"--{name}": settings.get(name) for name in ("lowest", "threshold")}


def _pipeline(settings: Settings) -> str:
    return str(settings.get("pipeline") or "PIPELINE")


def _assignments(settings: Settings) -> list[str]:
    own = {name.removeprefix("set "): value for name, value in settings.items() if name.startswith("set ")}
    return [word for name, value in own.items() for word in ("--set", f"{name}={value}")]


def _command(*words: str, **options: object) -> str:
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(["hydra-pipe", *words, *given])
