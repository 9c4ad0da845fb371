"""The end of a training that a trainer ran.

The training's result is returned, whatever happens to the last parts of the recording.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra_pipe.errors import RecordWarning
from hydra_pipe.recording.recorder import Recorder
from hydra_pipe.recording.settings import Labels
from hydra_pipe.recording.test_gradients import say_without_tests

# function that returns a new iterator over batches of (inputs, targets)
Tests = Callable[[], Iterator[tuple[Any, Any]]]


def finish(
    recorder: Recorder,
    tests: Tests | None,
    loss: Any,
    labels: Labels | None,
    keys: Sequence[str] | None,
) -> None:
    """Record the test gradients, if there are test samples, and close. Failures become warnings.

    Raises:
        HydraError: rows of the training itself cannot be recorded, so the recording has failed.
    """
    slip: Exception | None = None
    if tests is not None:
        try:
            recorder.record_test(tests(), loss, labels=labels, keys=keys)
        except Exception as error:
            if recorder.is_closed:
                raise
            slip = error
    try:
        recorder.close()
    except Exception as error:
        if recorder.is_closed:
            raise
        _warn(
            f"the recording of {recorder.path} was not closed: {error}. No row is lost: mend "
            "this, and call callback.recorder.close()"
        )
    # after the recording is closed: a warning filter may turn this warning into an error
    if slip is not None:
        say_without_tests(slip, recorder.path)


@contextmanager
def optional(path: Path, what: str) -> Iterator[None]:
    """Enter a block without which the recording is complete.

    An error in the block becomes a warning that `what` is left out.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the user's own code, after hours of training
        _warn(f"{what} of {path} are left out: {type(error).__name__}: {error}")


def _warn(message: str) -> None:
    warnings.warn(message, RecordWarning, stacklevel=3)
