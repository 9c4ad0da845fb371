"""Signals that ask to stop: they take effect between two steps, not in the middle of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A request to stop, or none yet.

    Args:
        number: number of the signal that asked to stop; None: no signal has come.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number is not None else ""


@contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """Enter a block in which SIGINT and SIGTERM ask to stop.

    A second signal ends the block at once, by KeyboardInterrupt or SystemExit. Outside of the main
    thread Python hears no signals, and nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def hear(number: int, frame: FrameType | None) -> None:
        if request.number is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        request.number = number

    # An ignored signal stays ignored: a shell ignores SIGINT for processes in the background.
    before = {
        number: handler
        for number in _STOPPING
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, hear)
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None: the handler was not set by Python, so Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
