"""How often the state of long work is kept, so that it goes on after a crash: it is to cost 2.5 % of the time at most."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

KEEP_SECONDS = 60.0
TIMES_ITS_COST = 40.0


def is_due(seconds: float, cost: float) -> bool:
    """Whether it is time, `seconds` after the last time, which took `cost` seconds."""
    return seconds >= max(KEEP_SECONDS, TIMES_ITS_COST * cost)


class Pace:
    """Tells when it is time again."""

    def __init__(self) -> None:
        self._at, self._cost = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        """Whether it is."""
        return is_due(time.monotonic() - self._at, self._cost)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """A block in which it is done."""
        start = time.monotonic()
        yield
        self._at = time.monotonic()
        self._cost = self._at - start
