"""What tasks of one process that run at the same time have in common, such as a block of test gradients."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class _Shared:
    """A value, and how many blocks are in."""

    value: Any
    n_users: int = 0


_SHARED: dict[tuple[Any, ...], _Shared] = {}
_LOCK = threading.Lock()


@contextmanager
def shared(key: tuple[Any, ...], load: Callable[[], Any]) -> Iterator[Any]:
    """A block that has the value of `key`: the first to enter loads the value, and the last to leave drops it.

    Counted, and not left to weak references: these would keep what the traceback of an interrupted task still refers to, and give
    it to a later reduction of a run that was recorded anew.
    """
    with _LOCK:
        found = _SHARED.get(key)
        if found is None:
            _SHARED[key] = found = _Shared(load())
        found.n_users += 1
    try:
        yield found.value
    finally:
        with _LOCK:
            found.n_users -= 1
            if not found.n_users:
                del _SHARED[key]
