"""What tasks of one process that run at the same time have in common, such as a block of test gradients."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Shared:
    """A value, and the blocks that are in."""

    value: Any
    users: set[object] = field(default_factory=set)


_SHARED: dict[tuple[Any, ...], _Shared] = {}
_LOCK = threading.Lock()


@contextmanager
def shared(key: tuple[Any, ...], load: Callable[[], Any]) -> Iterator[Any]:
    """A block that has the value of `key`: the first to enter loads the value, and the last to leave drops it.

    The blocks are counted. Weak references would keep what the traceback of an interrupted task still refers to, and give it to
    a later reduction of a run that was recorded anew.
    """
    user = object()
    try:
        with _LOCK:
            if key not in _SHARED:
                _SHARED[key] = _Shared(load())
            found = _SHARED[key]
            found.users.add(user)
        yield found.value
    finally:
        with _LOCK:
            if key in _SHARED:
                _SHARED[key].users.discard(user)
                if not _SHARED[key].users:
                    del _SHARED[key]
