"""Where a reduction is computed: in threads of this process, or by worker processes here or elsewhere (`cluster`)."""

import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import dask
import dask.local
import dask.threaded

from hydra_pipe.errors import UsageError
from hydra_pipe.plan.reduction import BASE_BYTES, OVERHEAD_BYTES
from hydra_pipe.units import resident_bytes

CountRows = Callable[[int], None]

# Not by name: to look one up Dask imports all of distributed, which takes longer than reducing a small run.
_GET = {"threads": dask.threaded.get, "synchronous": dask.local.get_sync}
# tcp://host:8786, tls://..., or host:8786
_ADDRESS = re.compile(r"([a-z]+://)?[^\s/]+:\d{1,5}/?")


@dataclass(frozen=True)
class Workers:
    """What computes.

    Args:
        count: threads that compute at once, over all processes.
        processes: whether they are in processes other than this one.
        threads: in one of these, at most.
        resident_bytes: that a process takes before it begins.
    """

    count: int
    processes: bool
    threads: int
    resident_bytes: int


class Scheduler(ABC):
    """Computes graphs. Enter it first: from then on it knows its workers."""

    workers: Workers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - nothing to close in this process
        pass

    def start(self, store: Path, run_id: str, peak_bytes: int) -> None:  # noqa: B027 - nothing to do in this process
        """Have workers that can do it, before anything is changed on the disk.

        Args:
            store: that they must be able to read.
            run_id: of the run that it belongs to.
            peak_bytes: that each process may take.

        Raises:
            ClusterError: a worker cannot.
        """

    @abstractmethod
    def counter(self, advance: Callable[[int], None], n_rows: int) -> CountRows:
        """What a task calls, wherever it runs, with the number of rows that it has done, 0 too; it reaches `advance`.

        It may raise, which ends the task: what it does is not needed any more.

        Args:
            advance: counts rows.
            n_rows: that are done when a graph is computed.
        """

    @abstractmethod
    def compute(self, graph: Any) -> Any:
        """Compute a graph, whose result is small. Raises: what its tasks raise; ClusterError: workers are lost."""


class _StoppedError(Exception):
    """What a task does is not needed any more: another one has failed."""


class InProcess(Scheduler):
    """Dask's own schedulers. Where a task fails those beside it end too, before the failure is told: none writes on.

    Args:
        name: "threads", one for each core, or "synchronous".
    """

    def __init__(self, name: str) -> None:
        self._name = name
        count = n_cores() if name == "threads" else 1
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
            own = {}
            if self._name == "threads":
                own["pool"] = ends.enter_context(ThreadPoolExecutor(self.workers.count, "hydra-pipe worker"))
            try:
                (result,) = dask.compute(graph, scheduler=_GET[self._name], num_workers=self.workers.count, **own)
            except BaseException:
                self._stopped.set()
                raise
        return result


def scheduler_of(text: str) -> Scheduler:
    """The scheduler that `--scheduler` names. Connects to nothing yet. Raises: UsageError: it names none."""
    if text in ("threads", "synchronous"):
        return InProcess(text)
    if text.lower().startswith(("http://", "https://")):
        raise UsageError(
            f"--scheduler {text} is a web address, such as that of a scheduler's dashboard: give the address that workers connect "
            f"to, which `dask scheduler` prints as it starts, such as tcp://host:8786"
        )
    if text != "processes" and not _ADDRESS.fullmatch(text):
        raise UsageError(
            f"--scheduler {text} is unknown: choose one of threads, processes, synchronous, or the address of a Dask scheduler, "
            f"such as tcp://host:8786"
        )
    # distributed takes most of a second to import
    from hydra_pipe.reduction.cluster import ClusterAt, ClusterHere

    return ClusterHere(n_cores()) if text == "processes" else ClusterAt(text.rstrip("/"))


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def base_bytes(resident: int) -> int:
    """Memory of a process that takes `resident` bytes already, but for what the plan counts."""
    return max(BASE_BYTES, resident + OVERHEAD_BYTES)
