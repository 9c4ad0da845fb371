"""Errors by name. Every message tells the problem and the way out."""

import reprlib
from typing import Any

# Most characters of a file's content that a message quotes.
_MOST_SHOWN = 120
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxlong = _brief.maxother = _MOST_SHOWN


def shown(value: Any) -> str:
    """Return a value from a file, or the error that it caused, as one short printable line."""
    text = (
        (str(value) or type(value).__name__)
        if isinstance(value, BaseException)
        else _brief.repr(value)
    )
    text = printable(text)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def printable(text: str) -> str:
    """Return `text` in one line, without anything that a terminal would obey."""
    return " ".join(
        "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split()
    )


class HydraError(Exception):
    """Base of every error that hydra-pipe raises on purpose.

    The message is one line: the thing, the numbers, and a way out. The command line prints the
    message and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(HydraError):
    """The call itself is wrong: an unknown setting, a wrong type, or a malformed option."""

    exit_code = 2


class ExtraError(HydraError, ModuleNotFoundError):
    """A package is needed that is not installed, and that hydra-pipe does not depend on."""


# Import name of a package that hydra-pipe does not depend on -> the extra with the package.
_EXTRAS = {
    "PIL": "report",
    "accelerate": "transformers",
    "distributed": "cluster",
    "gcsfs": "gcs",
    "jinja2": "report",
    "lightning": "lightning",
    "matplotlib": "plots",
    "pandas": "notebook",
    "pyspark": "spark",
    "s3fs": "s3",
    "sklearn": "pipelines",
    "transformers": "transformers",
    "upath": "url",
    "xarray": "xarray",
}


def extra_of(error: BaseException) -> str | None:
    """Return the extra with the package whose absence `error` reports, or None."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return _EXTRAS.get((name or "").partition(".")[0])


def missing_extra(what: str, extra: str, error: ImportError) -> ExtraError:
    """Return the error to raise if `what` lacks packages of `extra`, as `error` says."""
    return ExtraError(
        f"{what} cannot be used ({error}): pip install 'hydra-pipe[{extra}]'", name=error.name
    )


class PipelineError(HydraError):
    """The user's pipeline file is missing, broken, or describes something untrainable."""


class UserCodeError(PipelineError):
    """The user's own code raised. `excerpt` is its traceback, cut down to the user's own files."""

    def __init__(self, message: str, excerpt: str) -> None:
        super().__init__(message)
        self.excerpt = excerpt


class DataError(HydraError):
    """A data set yields other values than before, or values that the model does not take."""


class OptimizerError(HydraError):
    """An optimiser, or an option of one, whose update rule hydra-pipe does not differentiate."""


class ScheduleError(HydraError):
    """Learning rates, momenta or weight decays that are not finite, or steps out of order."""


class GradientMismatchError(HydraError):
    """The recorded rows of a step do not sum to the gradient that the optimiser is about to use."""


class NonFiniteError(HydraError):
    """A loss or a gradient is infinite or not a number."""


class RecordError(HydraError):
    """The training loop does something that recording cannot follow."""


class InterruptedRunError(HydraError):
    """A signal ended the command, and finished work is kept.

    `exit_code` is 128 plus the signal's number, as in a shell.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class LayerError(HydraError):
    """A module whose gradient cannot be split by sample, or two rules for one module."""


class RunError(HydraError):
    """A run directory that is missing, foreign, unfinished, or recorded with other settings."""


class StoreError(HydraError):
    """A store that is damaged, incomplete, or written by a newer format version."""


class ManifestError(StoreError):
    """A manifest that cannot be read, so that nothing is known of its run."""


class BudgetError(HydraError):
    """A plan that cannot fit the memory it was given. Carries both numbers in its message."""


class ClusterError(HydraError):
    """Worker processes that cannot be reached, cannot do the requested work, or are lost."""


class RecordWarning(UserWarning):
    """A recording goes on, or is complete, with a flaw that its user has to know.

    The message tells the flaw and the way out.
    """
