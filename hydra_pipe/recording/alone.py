"""The steps of a process that trains alone: it checks and writes them when it likes, and tells an error at once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hydra_pipe.errors import HydraError, RecordError
from hydra_pipe.recording.slab import Checked, Slab
from hydra_pipe.store import names

# loss of a step, and what else its line of the step tables holds
Pending = tuple[float, dict[str, Any]]


class LoneSteps:
    """What `JointSteps` does for several ranks, where there is nobody to agree with."""

    #: whether steps are checked and written whenever this process likes
    flushes_at_will = True
    #: what keeps the process from recording on until the ranks meet
    held: HydraError | None = None
    #: steps after which the ranks meet
    interval: int | None = None

    def __init__(self) -> None:
        self.n_skipped = 0

    def go_on(self, n_recorded: int, interval: int | None) -> None:
        """Go on after `n_recorded` steps of an earlier process, of which nothing has to be known."""

    def holding(self) -> AbstractContextManager[None]:
        """A block that raises its errors at once."""
        return nullcontext()

    def guarded(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """`hook` itself: it raises into the training's passes."""
        return hook

    def end_step(self, step: int, *, taken: bool, left_out: bool) -> bool:
        """Note what became of step number `step`.

        Args:
            step: its number.
            taken: whether the optimiser took it.
            left_out: whether the loop, or a gradient scaler, left it out on purpose.

        Returns:
            False: there is nobody to meet.

        Raises:
            RecordError: it was forgotten.
        """
        self.n_skipped += left_out
        if not taken and not left_out:
            raise without_step(step)
        return False

    def meet(self, slab: Slab | None, pending: Sequence[Pending]) -> tuple[Checked | None, Sequence[Pending], HydraError | None]:
        """Check the steps that wait.

        Args:
            slab: with their rows.
            pending: loss of each step, and what else its line of the step tables holds.

        Returns:
            The steps to write; `pending`; and the error to raise once they are written, or None.
        """
        if slab is None or not pending:
            return None, pending, None
        checked = slab.check(names.SAMPLE)
        return checked, pending, checked.error


def without_step(step: int) -> RecordError:
    """What is said of a step that the optimiser did not take."""
    return RecordError(
        f"step {step} ended without optimizer.step(): put it inside the with block of recorder.step(), or call zero_grad() there "
        f"where the loop leaves the step out"
    )
