"""From `path/to/file.py:function` and `KEY=VALUE` settings to a pipeline."""

import importlib.util
import inspect
import random
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

from hydra_pipe.errors import HydraError, PipelineError, UsageError
from hydra_pipe.recording.pipeline import Pipeline
from hydra_pipe.recording.user_code import user_code_error

DEFAULT_FUNCTION = "pipeline"
# how the names of a pipeline function's settings begin in a recording
_SET = "set "


@dataclass(frozen=True)
class PipelineSource:
    """A function in a user's file, with all of its settings resolved. The file has been run, the function not yet.

    Args:
        file: the path as it was given.
        function: its name.
        settings: a value for each of its parameters, defaults included.
    """

    file: str
    function: str
    settings: dict[str, Any]
    _build: Any

    @property
    def recorded_settings(self) -> dict[str, str | int | float | bool | None]:
        """The settings as a recording keeps them, each below "set NAME": in JSON, so that what is read back compares equal."""
        plain = (str, int, float, bool, type(None))
        return {f"{_SET}{name}": value if isinstance(value, plain) else str(value) for name, value in self.settings.items()}

    def build(self) -> Pipeline:
        """Call the function, with all random generators seeded by its `seed` setting (0 if it has none).

        Raises:
            UserCodeError: it raised.
            PipelineError: it does not return a Pipeline.
        """
        seed = self.settings.get("seed", 0)
        seed = seed if isinstance(seed, int) else 0
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # the user's code may draw from the global generator
        random.seed(seed)
        try:
            pipeline = self._build(**self.settings)
        except HydraError:
            raise
        except (Exception, SystemExit) as error:
            raise user_code_error(f"{self.file}:{self.function} raised", error) from error
        if not isinstance(pipeline, Pipeline):
            raise PipelineError(f"{self.file}:{self.function} returned {type(pipeline).__name__}: it must return a Pipeline")
        return pipeline


def load_pipeline(spec: str, assignments: Mapping[str, Any] | list[str] | None = None) -> PipelineSource:
    """Find the function that `spec` names and bind its settings.

    Args:
        spec: "path/to/file.py" or "path/to/file.py:function".
        assignments: "KEY=VALUE" strings, converted by the function's annotations; or a mapping of values, taken as they are.

    Raises:
        PipelineError: no such file or function.
        UserCodeError: the file raised when run.
        UsageError: an unknown setting, or a value that is not of the annotated type.
    """
    path, colon, function = spec.rpartition(":")
    if not colon or function.endswith(".py"):
        path, function = spec, DEFAULT_FUNCTION
    build = getattr(_run_file(path), function, None)
    if not callable(build):
        raise PipelineError(f"{path} has no function {function}: define it, or name another as {path}:NAME")
    return PipelineSource(path, function, _settings(f"{path}:{function}", build, assignments or {}), build)


def recorded_assignments(settings: Mapping[str, Any]) -> list[str]:
    """What `--set` gave, or the defaults were, as text: so that annotations convert it as they did.

    Args:
        settings: of a recording, see `PipelineSource.recorded_settings`.
    """
    return [
        f"{key.removeprefix(_SET)}={'none' if value is None else value}" for key, value in settings.items() if key.startswith(_SET)
    ]


def _run_file(path: str) -> types.ModuleType:
    file = Path(path)
    if not file.is_file():
        raise PipelineError(f"there is no pipeline file {path}: give the path of a .py file")
    spec = importlib.util.spec_from_file_location(f"hydra_pipe_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise PipelineError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up there
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
        raise PipelineError(f"{what}: an annotation cannot be resolved ({error}): import what it names") from error
    settings = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
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
            raise UsageError(f"{what}: {key}={text!r} is not one of {', '.join(map(str, get_args(kind)))}")
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
    if kind in (int, float, Path):
        try:
            return kind(text)
        except ValueError:
            raise UsageError(f"{what}: {key}={text!r} is not {'an int' if kind is int else 'a float'}") from None
    return text
