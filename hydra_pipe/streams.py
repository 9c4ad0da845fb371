"""Iterators that own a thread, processes or files. The garbage collector never closes them."""

from collections.abc import Callable, Iterator
from typing import Self, TypeVar

T = TypeVar("T")


class Stream(Iterator[T]):
    """Iterator over `items` that releases the resources behind them.

    It does so at the end of the items, if the items raise, and if the user calls `close`::

        with closing(rows.stream(run, 512)) as pieces:
            for piece in pieces:
                ...

    A generator with a `with` around its `yield` is closed by the garbage collector too, if its
    user was interrupted. The collector may do so in any thread and at any moment, for example
    inside of the lock that the end of a thread waits for. For a stream that its user does not
    close, the collector frees the memory only.

    Args:
        items: generator without a `with` or a `finally` around a `yield`.
        release: function that releases the resources behind `items`, and waits until they are
            gone. Called once.
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
        """Yield nothing more, and release the resources of the items. May be called again."""
        if not self._closed:
            self._closed = True
            self._release()
