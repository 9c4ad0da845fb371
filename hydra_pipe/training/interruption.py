"""A signal that asks to stop: heard between two steps, not in the middle of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody has asked to stop.

    Args:
        number: of the signal that did; None: nobody has.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number is not None else ""


@contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """A block in which SIGINT and SIGTERM ask to stop. A second one ends it where it is, by KeyboardInterrupt or SystemExit.

    Outside of the main thread Python hears no signals, and nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def hear(number: int, frame: FrameType | None) -> None:
        if request.number is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        request.number = number

    # what is ignored stays so, as SIGINT is in what a shell has put into the background
    before = {number: handler for number in _STOPPING if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, hear)
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None: set by something that is not Python, and not to be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
