"""Pipelines and datasets from `file.py:function` and settings, and the pipeline of a run."""

import importlib.util
import inspect
import random
import sys
import sysconfig
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch.utils.data import DataLoader

from hydra_pipe.errors import HydraError, PipelineError, RunError, UsageError, shown
from hydra_pipe.recording.datasets import dataset_batches
from hydra_pipe.recording.settings import json_settings
from hydra_pipe.recording.test_gradients import digest_of
from hydra_pipe.recording.user_code import user_code_error
from hydra_pipe.store.data.probes import SAMPLES
from hydra_pipe.store.files import is_remote, local_path
from hydra_pipe.store.run.commands import DATASET
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import PROBE, RECORD, Settings
from hydra_pipe.training.pipeline import Pipeline, check_dataset, described

DEFAULT_FUNCTION = "pipeline"
_PACKAGE = Path(__file__).parent
# Prefix of the names of a function's settings in a manifest.
_SET = "set "


@dataclass(frozen=True)
class UserFunction:
    """A function in a user's file, with all of its settings resolved.

    The file has been run, the function not yet.

    Args:
        file: path as it was given.
        function: name of the function.
        settings: value of each parameter of the function, defaults included.
    """

    file: str
    function: str
    settings: dict[str, Any]
    _build: Any

    @property
    def spec(self) -> str:
        """File and function in the form that `load_pipeline` takes."""
        return f"{self.file}:{self.function}"

    @property
    def recorded_settings(self) -> dict[str, str | int | float | bool | None]:
        """Settings in the form that a recording keeps, each under the name "set NAME".

        The values are plain JSON, so that they compare equal after reading.
        """
        plain = (str, int, float, bool, type(None))
        return {
            f"{_SET}{name}": value if isinstance(value, plain) else str(value)
            for name, value in self.settings.items()
        }

    def call(self) -> Any:
        """Call the function, with random generators seeded by its `seed` setting, or by 0.

        Raises:
            UserCodeError: the function raised.
        """
        seed = self.settings.get("seed", 0)
        seed = seed if isinstance(seed, int) else 0
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # the user's code may draw from the global generator
        random.seed(seed)
        try:
            return self._build(**self.settings)
        except HydraError:
            raise
        except (Exception, SystemExit) as error:
            raise user_code_error(f"{self.spec} raised", error) from error


class PipelineFunction(UserFunction):
    """A function that returns a Pipeline."""

    def build(self) -> Pipeline:
        """Call the function.

        Raises:
            UserCodeError: the function raised.
            PipelineError: the function does not return a Pipeline.
        """
        pipeline = self.call()
        if not isinstance(pipeline, Pipeline):
            raise PipelineError(
                f"{self.spec} returned {type(pipeline).__name__}: it must return a Pipeline"
            )
        return pipeline


class DatasetFunction(UserFunction):
    """A function that returns a map-style dataset of (input, target), or a loader."""

    def build(self) -> Any:
        """Call the function.

        Raises:
            UserCodeError: the function raised.
            PipelineError: the function returns something else, or an empty dataset.
        """
        dataset = self.call()
        if not isinstance(dataset, DataLoader):
            check_dataset(f"what {self.spec} returned", dataset)
        return dataset


def load_pipeline(
    spec: str, assignments: Mapping[str, Any] | list[str] | None = None
) -> PipelineFunction:
    """Find the function that `spec` names and bind its settings.

    Args:
        spec: "path/to/file.py" or "path/to/file.py:function".
        assignments: "KEY=VALUE" strings, converted by the function's annotations; or a mapping
            of values, used unchanged.

    Raises:
        PipelineError: there is no such file or function.
        UserCodeError: the file raised when run.
        UsageError: a setting is unknown, or a value is not of the annotated type.
    """
    path, function = _split_spec(spec)
    return PipelineFunction(
        *_found(path, function or DEFAULT_FUNCTION, assignments, "pipeline file")
    )


def built_pipeline(
    pipeline: str | Pipeline, assignments: Mapping[str, Any] | list[str] | None
) -> tuple[Pipeline, dict[str, str | int | float | bool | None]]:
    """Return a pipeline to record, and the facts about its origin that the recording keeps.

    Args:
        pipeline: file and function, in the form that `load_pipeline` takes; or a built Pipeline.
        assignments: settings for `load_pipeline`, allowed only for a file.

    Raises:
        PipelineError: there is no such file or function, or settings were given for a built
            Pipeline.
        UserCodeError, UsageError: any error of `load_pipeline`.
    """
    if isinstance(pipeline, Pipeline):
        if assignments:
            raise PipelineError(
                "settings are for a pipeline file, and a Pipeline was given: leave the settings out"
            )
        return pipeline, {"pipeline": None}
    source = load_pipeline(pipeline, assignments)
    built = source.build()
    return built, {"pipeline": source.spec} | source.recorded_settings


def load_dataset(
    spec: str, assignments: Mapping[str, Any] | list[str] | None = None
) -> DatasetFunction:
    """Find the function that `spec` names and bind its settings.

    Args:
        spec: "path/to/file.py:function".
        assignments: settings, in the form that `load_pipeline` takes.

    Raises:
        UsageError: `spec` names no function.
        HydraError: any error of `load_pipeline`.
    """
    path, function = _split_spec(spec)
    if not function:
        raise UsageError(
            f"{spec} names no function: write {path}:NAME, a function that returns a dataset of "
            "(input, target)"
        )
    return DatasetFunction(*_found(path, function, assignments, "file"))


def pipeline_of(
    run: RunDirectory, given: str | Pipeline | None, advice: str
) -> Callable[[], Pipeline]:
    """Return a function that builds the untrained pipeline of `run`, and refuses another one.

    Args:
        run: run with a recording.
        given: newly built pipeline, or the file that builds it. None means the file that was
            recorded.
        advice: purpose of the pipeline and the way to give it, for a run that does not name one.

    Raises:
        RunError: any error of `recorded_spec`. The returned function raises it too if the
            pipeline is another one than was recorded; the message names the difference.
    """
    settings, spec = run.stages[RECORD].settings, recorded_spec(run, given, advice)

    def load() -> Pipeline:
        built = (
            spec
            if isinstance(spec, Pipeline)
            else load_pipeline(spec, recorded_assignments(settings)).build()
        )
        for name, value in json_settings(described(built)).items():
            if name in settings and settings[name] != value:
                what, was, now = _difference(name, settings[name], value)
                raise RunError(
                    f"{run.path} was recorded with {what} {was}, and the pipeline has {now}: give "
                    "the pipeline of the recording"
                )
        return built

    return load


def with_probe(
    run: RunDirectory, load: Callable[[], Pipeline], name: str, given: Any = None
) -> Callable[[], Pipeline]:
    """Return a function that builds a pipeline with the samples of probe `name` as its tests.

    Args:
        run: run with the probe.
        load: function that builds the pipeline.
        name: name of the probe.
        given: dataset of the probe. None means the one that the probe names.

    Raises:
        RunError: the dataset is not known. The returned function raises it too if the dataset is
            another one than the probe was taken of.
    """
    path, settings = run.path, run.stages[PROBE.of(name)].settings
    spec = settings.get(DATASET)
    if given is None and not isinstance(spec, str):
        raise RunError(
            f"{path}: hydra-exact needs the samples of probe {name}, whose dataset was given as "
            "an object: give it again, as hydra_pipe.reduce(run, method='hydra-exact', "
            f"probe='{name}', dataset=...)"
        )

    def probed() -> Pipeline:
        pipeline = load()
        dataset = (
            load_dataset(str(spec), recorded_assignments(settings)).build()
            if given is None
            else given
        )
        check_dataset(f"the dataset of probe {name}", dataset)
        if digest_of(
            dataset_batches(dataset, "probe", pipeline.seed, pipeline.batch_size)
        ) != settings.get(SAMPLES):
            raise RunError(
                f"{path}: the samples of probe {name} are not the ones that it was taken of: give "
                "those, or take it again with hydra-pipe probe --overwrite"
            )
        return replace(pipeline, test=dataset, test_labels=None, test_keys=None)

    return probed


def recorded_spec(run: RunDirectory, given: str | Pipeline | None, advice: str) -> str | Pipeline:
    """Return the pipeline of `run`, or the spec that `load_pipeline` takes to build it.

    `pipeline_of` describes the arguments.

    Raises:
        RunError: the pipeline is not known, or is a file that may not be run unasked.
    """
    if given is not None:
        return given
    spec = run.stages[RECORD].settings.get("pipeline")
    if not isinstance(spec, str):
        raise RunError(
            f"{run.path} was recorded in a loop of your own, or from a Pipeline object: {advice}"
        )
    _refuse_stranger(run.path, spec)
    return spec


def recorded_assignments(settings: Settings) -> list[str]:
    """Return the settings of a recording as "KEY=VALUE" text.

    As text, annotations convert them like the original values of `--set`.
    """
    own = {key.removeprefix(_SET): value for key, value in settings.items() if key.startswith(_SET)}
    return [f"{key}={'none' if value is None else value}" for key, value in own.items()]


def _refuse_stranger(run: Path, spec: str) -> None:
    """Refuse to run a pipeline that may not be the user's own.

    A run may come from a stranger, and its manifest may name any function of any file.

    Raises:
        RunError: the file of `spec` lies in the run itself, belongs to an installed package, or
            does not use hydra-pipe.
    """
    file = local_path(_split_spec(spec)[0], "the pipeline's file")
    if not file.is_file():
        return  # loading it will report this
    where = file.resolve()
    packages = {"site-packages", "dist-packages"} & set(where.parts) or _PACKAGE in where.parents
    if not is_remote(run) and run.resolve() in where.parents:
        why = "lies in the run itself"
    elif packages or any(
        Path(place).resolve() in where.parents
        for place in (sysconfig.get_path("stdlib"), sys.prefix)
    ):
        why = "is part of an installed package"
    elif "hydra_pipe" not in where.read_text(encoding="utf-8", errors="replace"):
        why = "does not mention hydra_pipe"
    else:
        return
    raise RunError(
        f"{run} names the pipeline {spec}, which {why}. hydra-pipe does not run such a file "
        "unasked: give it with --pipeline if it is yours"
    )


def _difference(name: str, was: Any, now: Any) -> tuple[str, str, str]:
    """Return the name of the difference between two settings, and both values in words.

    For two objects, the difference is their first differing key.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in dict.fromkeys([*was, *now]) if was.get(key) != now.get(key))
        return _difference(f"{name} {key}", was.get(key), now.get(key))
    then, since = ("none" if value is None else shown(value) for value in (was, now))
    return name, then, since


def _split_spec(spec: str) -> tuple[str, str]:
    """Return the file and the function of a spec. The function is "" if none is named."""
    path, colon, function = spec.rpartition(":")
    return (spec, "") if not colon or function.endswith(".py") else (path, function)


def _found(
    path: str, function: str, assignments: Mapping[str, Any] | list[str] | None, what: str
) -> tuple[str, str, dict[str, Any], Any]:
    path = str(local_path(path, f"the {what}"))
    build = getattr(_run_file(path, what), function, None)
    if not callable(build):
        raise PipelineError(
            f"{path} has no function {function}: define it, or name another as {path}:NAME"
        )
    return path, function, _settings(f"{path}:{function}", build, assignments or {}), build


def _run_file(path: str, what: str) -> types.ModuleType:
    file = Path(path)
    if not file.is_file():
        raise PipelineError(f"there is no {what} {path}: give the path of a .py file")
    spec = importlib.util.spec_from_file_location(f"hydra_pipe_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise PipelineError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look up a class's module there
    # A pipeline may import its neighbours, as a script may.
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except HydraError:
        raise
    except (Exception, SystemExit) as error:
        raise user_code_error(f"{path} raised when it was loaded", error) from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module


def _settings(what: str, build: Any, assignments: Mapping[str, Any] | list[str]) -> dict[str, Any]:
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(build).parameters.values()
    parameters = {p.name: p for p in signature if p.kind not in starred}
    try:
        hints = get_type_hints(build)
    except NameError as error:
        raise PipelineError(
            f"{what}: an annotation cannot be resolved ({error}): import the name"
        ) from error
    settings = {
        name: p.default
        for name, p in parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    pairs = assignments.items() if isinstance(assignments, Mapping) else map(_split, assignments)
    for key, value in pairs:
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise UsageError(f"{what} has no setting {key!r}: it has {known}")
        is_text = not isinstance(assignments, Mapping)
        settings[key] = _converted(what, key, value, hints.get(key, str)) if is_text else value
    missing = [name for name in parameters if name not in settings]
    if missing:
        raise UsageError(f"{what} needs a value for {missing[0]!r}: add --set {missing[0]}=VALUE")
    return settings


def _split(assignment: str) -> tuple[str, str]:
    key, equals, value = assignment.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {assignment} is not KEY=VALUE: write, for example, --set lr=0.1")
    return key, value


_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def _converted(what: str, key: str, text: str, kind: Any) -> Any:
    origin = get_origin(kind)
    if origin is Literal:
        chosen = [choice for choice in get_args(kind) if str(choice) == text]
        if not chosen:
            raise UsageError(
                f"{what}: {key}={text!r} is not one of {', '.join(map(str, get_args(kind)))}"
            )
        return chosen[0]
    if origin in (Union, types.UnionType):
        kinds = get_args(kind)
        if type(None) in kinds and text.lower() in ("none", ""):
            return None
        return _converted(what, key, text, next(k for k in kinds if k is not type(None)))
    if kind is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise UsageError(f"{what}: {key}={text!r} is not a bool: write true or false")
        return text.lower() in _TRUE
    if kind is Path:
        return local_path(text, key) if text else Path()
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UsageError(
                f"{what}: {key}={text!r} is not {'an int' if kind is int else 'a float'}"
            ) from None
    return text
