"""A reduction that threads of this process compute."""

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
    """What a task does is not needed any more: another one has failed."""


class InProcess(Scheduler):
    """Dask's own schedulers. Where a task fails those beside it end too, before the failure is told: none writes on.

    Args:
        n_threads: None computes in the calling thread.
    """

    def __init__(self, n_threads: int | None) -> None:
        self._n_threads = n_threads
        count = n_threads or 1
        self.workers = Workers(count, processes=False, threads=count, resident_bytes=resident_bytes())
        self._stopped = threading.Event()

    def counter(self, advance: Callable[[int], None], n_rows: int) -> CountRows:
        def count(n: int) -> None:
            if self._stopped.is_set():
                raise _StoppedError
            advance(n)

        return count

    def compute(self, graph: Any) -> Any:
        with ExitStack() as ends:
            # Not by name: to look one up Dask imports all of distributed, which takes longer than reducing a small run.
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
