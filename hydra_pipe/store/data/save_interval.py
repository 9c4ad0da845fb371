"""Intervals at which long work saves its state, to resume after a crash.

Saving is to cost 2.5 % of the time at most.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

KEEP_SECONDS = 60.0
TIMES_ITS_COST = 40.0


def is_due(seconds: float, cost: float) -> bool:
    """Tell whether to save again, `seconds` after the last save, which took `cost` seconds."""
    return seconds >= max(KEEP_SECONDS, TIMES_ITS_COST * cost)


class SaveInterval:
    """A clock that tells when to save again."""

    def __init__(self) -> None:
        self._at, self._cost = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        """True if it is time to save."""
        return is_due(time.monotonic() - self._at, self._cost)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Time the block, which saves the state."""
        start = time.monotonic()
        yield
        self._at = time.monotonic()
        self._cost = self._at - start
