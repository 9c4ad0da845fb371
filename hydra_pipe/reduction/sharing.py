"""Values shared by tasks that run at once in one process, such as a block of test gradients."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Shared:
    """A shared value, and the `with` blocks that use it."""

    value: Any
    users: set[object] = field(default_factory=set)


_SHARED: dict[tuple[Any, ...], _Shared] = {}
_LOCK = threading.Lock()


@contextmanager
def shared(key: tuple[Any, ...], load: Callable[[], Any]) -> Iterator[Any]:
    """Share the value of `key` among `with` blocks. The first loads it, and the last drops it.

    The blocks are counted. A weak reference would stay alive as long as the traceback of an
    interrupted task refers to the value. A later reduction of a run that was recorded anew would
    then get the old value.
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
