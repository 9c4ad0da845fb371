"""One BLAS thread in each worker.

The workers already use every core, so more BLAS threads would only compete with them.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
R = TypeVar("R")

_LOCK = threading.Lock()
_running = 0
_limits: Any = None


@functools.cache
def _blas() -> ThreadpoolController:
    """Return the BLAS libraries of this process, of which NumPy has loaded its own.

    To look for them takes as long as a short task: every loaded library is looked at.
    """
    return ThreadpoolController().select(user_api="blas")


def single_threaded_blas(task: Callable[P, R]) -> Callable[P, R]:
    """Wrap `task` so that BLAS uses one thread while the task runs.

    The number of BLAS threads belongs to the whole process. So the first task to begin limits it,
    and the last task to end restores it.
    """

    @functools.wraps(task)
    def limited(*args: P.args, **kwargs: P.kwargs) -> R:
        _begin()
        try:
            return task(*args, **kwargs)
        finally:
            _end()

    return limited


def _begin() -> None:
    global _running, _limits
    with _LOCK:
        if not _running:
            _limits = _blas().limit(limits=1)
        _running += 1


def _end() -> None:
    global _running, _limits
    with _LOCK:
        _running -= 1
        if not _running and _limits is not None:
            _limits.restore_original_limits()
            _limits = None
