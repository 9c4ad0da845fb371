"""What can go wrong, by name. Every message says what is wrong and what to do about it."""

import reprlib
from typing import Any

# characters that a message gives to what a file says
_MOST_SHOWN = 120
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxlong = _brief.maxother = _MOST_SHOWN


def shown(value: Any) -> str:
    """What a file says, or the error that it led to, as a message shows it: in one line, printable and short."""
    text = (str(value) or type(value).__name__) if isinstance(value, BaseException) else _brief.repr(value)
    text = printable(text)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def printable(text: str) -> str:
    """`text` in one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split())


class HydraError(Exception):
    """Base of every error that hydra-pipe raises on purpose.

    The message is one line: the thing, the numbers, and a way out. The command line prints it and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(HydraError):
    """The call itself is wrong: an unknown setting, a value of the wrong type, a malformed option."""

    exit_code = 2


class ExtraError(HydraError, ModuleNotFoundError):
    """Something needs a package that is not installed, and that hydra-pipe does not depend on."""


# what is imported of a package that hydra-pipe does not depend on -> the extra that has it
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
    """The extra of hydra-pipe that has the package whose absence `error` tells of; None: there is none."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return _EXTRAS.get((name or "").partition(".")[0])


def missing_extra(what: str, extra: str, error: ImportError) -> ExtraError:
    """The error to raise where `what` cannot be imported without the packages of `extra`, as `error` says."""
    return ExtraError(f"{what} cannot be used ({error}): pip install 'hydra-pipe[{extra}]'", name=error.name)


class PipelineError(HydraError):
    """The user's pipeline file is missing, broken, or describes something that cannot be trained."""


class UserCodeError(PipelineError):
    """The user's own code raised. `excerpt` is its traceback, cut down to the user's own files."""

    def __init__(self, message: str, excerpt: str) -> None:
        super().__init__(message)
        self.excerpt = excerpt


class DataError(HydraError):
    """A data set yields something other than what it yielded before, or what the model takes."""


class OptimizerError(HydraError):
    """An optimiser, or an option of one, whose update rule hydra-pipe does not differentiate."""


class ScheduleError(HydraError):
    """Learning rates, momenta or weight decays that are not finite, or steps out of order."""


class BooksError(HydraError):
    """The recorded rows of a step do not sum to the gradient that the optimiser is about to use."""


class NonFiniteError(HydraError):
    """A loss or a gradient is infinite or not a number."""


class RecordError(HydraError):
    """The training loop does something that recording cannot follow."""


class InterruptedRunError(HydraError):
    """A signal has ended the command, which has kept what was done. `exit_code` is 128 and the signal's number, as in a shell."""

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
    """Worker processes that cannot be reached, cannot do what is asked of them, or are lost."""


class RecordWarning(UserWarning):
    """A recording goes on, or is complete, with something that its user has to know: the message says what, and what to do."""
