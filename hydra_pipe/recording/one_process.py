"""Steps of a process that trains alone.

The process checks and writes its steps at any time, and raises an error at once.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hydra_pipe.errors import HydraError, RecordError
from hydra_pipe.recording.checked_steps import Checked
from hydra_pipe.recording.row_buffer import RowBuffer
from hydra_pipe.store import names

# loss of a step, and the other values of its line in the step tables
Pending = tuple[float, dict[str, Any]]


class OneProcess:
    """The counterpart of `ManyProcesses` for one process, which has nobody to agree with."""

    #: whether this process may check and write steps at any time
    flushes_at_will = True
    #: error that stops the recording until the ranks meet; always None for one process
    held: HydraError | None = None
    #: number of steps after which the ranks meet; always None for one process
    interval: int | None = None

    def __init__(self) -> None:
        self.n_skipped = 0

    def resume(self, n_recorded: int, interval: int | None) -> None:
        """Resume after `n_recorded` steps of an earlier process. One process needs no value."""

    def holding(self) -> AbstractContextManager[None]:
        """Return a block that raises its errors at once."""
        return nullcontext()

    def guarded(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return `hook` itself. An error in `hook` is raised inside the training's passes."""
        return hook

    def end_step(self, step: int, *, taken: bool, left_out: bool) -> bool:
        """Note the outcome of step number `step`.

        Args:
            step: number of the step.
            taken: True if the optimiser took the step.
            left_out: True if the loop, or a gradient scaler, left the step out on purpose.

        Returns:
            False: there are no other ranks to meet.

        Raises:
            RecordError: the loop neither took the step nor left it out on purpose.
        """
        self.n_skipped += left_out
        if not taken and not left_out:
            raise without_step(step)
        return False

    def synchronize(
        self, buffer: RowBuffer | None, pending: Sequence[Pending]
    ) -> tuple[Checked | None, Sequence[Pending], HydraError | None]:
        """Check the steps that wait.

        Args:
            buffer: rows of the waiting steps; None if there are none.
            pending: loss of each step, and the other values of its line in the step tables.

        Returns:
            The steps to write; `pending`; and the error to raise after the steps are written,
            or None.
        """
        if buffer is None or not pending:
            return None, pending, None
        checked = buffer.check(names.SAMPLE)
        return checked, pending, checked.error


def without_step(step: int) -> RecordError:
    """Return the error for a step that ended without `optimizer.step()`."""
    return RecordError(
        f"step {step} ended without optimizer.step(): put it inside the with block of "
        "recorder.step(). If the loop leaves the step out, call zero_grad() there"
    )
