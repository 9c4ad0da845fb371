"""The executor that computes a reduction in threads of this process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import dask
import dask.local
import dask.threaded

from hydra_pipe.reduction.executors.base import CountRows, Scheduler, Workers
from hydra_pipe.units import resident_bytes


class _StoppedError(Exception):
    """Raised in a task to end it: another task has failed, so its result is not needed."""


class InProcess(Scheduler):
    """Executor on Dask's own schedulers.

    If a task fails, the tasks beside it end before the error is raised. So no task still writes
    after the error.

    Args:
        n_threads: number of threads. None: the calling thread computes.
    """

    def __init__(self, n_threads: int | None) -> None:
        self._n_threads = n_threads
        count = n_threads or 1
        self.workers = Workers(
            count, processes=False, threads=count, resident_bytes=resident_bytes()
        )
        self._stopped = threading.Event()

    def counter(self, advance: Callable[[int], None], n_rows: int) -> CountRows:
        def count(n: int) -> None:
            if self._stopped.is_set():
                raise _StoppedError
            advance(n)

        return count

    def compute(self, graph: Any) -> Any:
        with ExitStack() as ends:
            # Give the function, not its name: to look up a name Dask imports all of distributed,
            # which takes longer than reducing a small run.
            how: dict[str, Any] = {"scheduler": dask.local.get_sync}
            if self._n_threads is not None:
                pool = ends.enter_context(ThreadPoolExecutor(self._n_threads, "hydra-pipe worker"))
                how = {"scheduler": dask.threaded.get, "pool": pool}
            try:
                (result,) = dask.compute(graph, num_workers=self.workers.count, **how)
            except BaseException:
                self._stopped.set()
                raise
        return result
