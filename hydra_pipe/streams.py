"""Iterators that own a thread, processes or files: whoever iterates closes them, the garbage collector never does."""

from collections.abc import Callable, Iterator
from typing import Self, TypeVar

T = TypeVar("T")


class Stream(Iterator[T]):
    """Yields `items`, and lets go of what they need: at their end, where they raise, and where their user calls `close`::

        with closing(rows.stream(run, 512)) as pieces:
            for piece in pieces:
                ...

    A generator that does so by a `with` around its `yield` is closed by the garbage collector too, wherever its user was
    interrupted: in any thread and at any moment, such as inside of the lock that the end of a thread waits for. Of a stream whose
    user does not close it the collector takes the memory alone.

    Args:
        items: a generator without a `with` or a `finally` around a `yield`.
        release: lets go of what `items` need, and waits until that is gone. Called once.
    """

    def __init__(self, items: Iterator[T], release: Callable[[], None]) -> None:
        self._items, self._release = items, release
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        try:
            return next(self._items)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Yield nothing more, and let go of what the items need. May be called again."""
        if not self._closed:
            self._closed = True
            self._release()
