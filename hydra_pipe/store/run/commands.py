"""Commands that make the stages of a run, written from the settings of the stages."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_pipe.store import names
from hydra_pipe.store.run.results import BY_LABEL, DEFAULT_METHOD, DYNAMICS, MEAN, ResultName

# Setting of a probe: FILE:FUNCTION of its dataset, or null.
DATASET = "dataset"
# Fact of a combination: paths of its runs.
PATHS = "paths"
# Value of `reduce --top` in a command for a result that nobody has computed.
_USUAL_TOP = 100
_GROUPED = {None: [], BY_LABEL: ["--by", "label"], MEAN: ["--mean"]}
_Settings = Mapping[str, Any]


def recording(run: Path, settings: _Settings) -> str:
    """Return the command that records."""
    options = {f"--{name}": settings.get(name) for name in ("encoding", "dim", "dtype")}
    return _command("record", _pipeline(settings), str(run), *_assignments(settings), **options)


def reducing(run: Path, name: str, settings: _Settings) -> str:
    """Return the command that computes the relevance called `name`."""
    result = ResultName.parse(name)
    options = {
        "--tests": settings.get(names.TESTS),
        "--up-to-step": settings.get(names.UPTO),
        "--rank": result.rank,
        "--top": settings.get(names.TOP, _USUAL_TOP if result.is_top else None),
    }
    options |= {
        "--probe": result.probe,
        "--method": None if result.method == DEFAULT_METHOD else result.method,
    }
    return _command("reduce", str(run), *_GROUPED[result.by], **options)


def combining(run: Path, name: str, facts: _Settings) -> str:
    """Return the command that combines runs. `facts`: facts of the stage, which have the paths."""
    paths = facts.get(PATHS)
    runs = list(map(str, paths)) if isinstance(paths, list) and paths else ["RUN..."]
    method = None if name == DEFAULT_METHOD else name
    return _command("combine", *runs, **{"--into": run, "--method": method})


def probing(run: Path, name: str, settings: _Settings) -> str:
    """Return the command that takes the test gradients of probe `name`."""
    dataset = str(settings.get(DATASET) or "FILE.py:FUNCTION")
    return _command("probe", str(run), dataset, *_assignments(settings), **{"--name": name})


def exporting(run: Path, name: str, settings: _Settings) -> str:
    """Return the command that writes the rankings of the relevance called `name`."""
    full = ["--full"] if settings.get("full") else []
    top = settings.get(names.TOP)
    return _command("export", str(run), *full, **{"--method": name, "--top": top})


def cleaning(run: Path, name: str, settings: _Settings) -> str:
    """Return the command that proposes samples to relabel or drop, by the relevance `name`."""
    cut = {f"--{key}": settings.get(key) for key in ("lowest", "threshold", names.ROUNDS)}
    cautious = ["--cautious"] if settings.get("cautious") else []
    method = None if name == DYNAMICS else name
    return _command("clean", str(run), *cautious, **{"--method": method}, **cut)


def reporting(run: Path, name: str, settings: _Settings) -> str:
    """Return the command that writes the page about the relevance called `name`."""
    options = {"--tests": settings.get(names.TESTS), "--top": settings.get(names.TOP)}
    return _command("report", str(run), **{"--method": name}, **options)


def evaluating(run: Path, kind: str, settings: _Settings, recorded: _Settings) -> str:
    """Return the command of one kind of evaluation. `recorded`: settings of the recording."""
    of_kinds = ("samples", "retrainings", "seeds", "left_out", "drop", names.TESTS, names.BY)
    options = {f"--{name.replace('_', '-')}": settings.get(name) for name in of_kinds}
    return _command(
        "evaluate", _pipeline(recorded), str(run), kind, *_assignments(recorded), **options
    )


def _pipeline(settings: _Settings) -> str:
    return str(settings.get("pipeline") or "PIPELINE")


def _assignments(settings: _Settings) -> list[str]:
    own = {
        name.removeprefix("set "): value
        for name, value in settings.items()
        if name.startswith("set ")
    }
    return [word for name, value in own.items() for word in ("--set", f"{name}={value}")]


def _command(*words: str, **options: object) -> str:
    given = [
        word for name, value in options.items() if value is not None for word in (name, str(value))
    ]
    return shlex.join(["hydra-pipe", *words, *given])
