"""The interface of the executors of a reduction, and their workers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

CountRows = Callable[[int], None]


@dataclass(frozen=True)
class Workers:
    """Number and kind of the workers of an executor.

    Args:
        count: number of threads that compute at once, over all processes.
        processes: True if the threads are in processes other than this one.
        threads: largest number of threads in one process.
        resident_bytes: memory of a process before it begins to compute.
    """

    count: int
    processes: bool
    threads: int
    resident_bytes: int


class Scheduler(ABC):
    """Executor of graphs. Its workers are known once its context is entered."""

    workers: Workers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - nothing to close in this process
        pass

    def start(self, store: Path, run_id: str, peak_bytes: int) -> None:  # noqa: B027 - nothing to do in this process
        """Make workers ready and check them, before anything is changed on the disk.

        Args:
            store: path of the store that the workers must be able to read.
            run_id: id of the run that the store belongs to.
            peak_bytes: memory that each process may take.

        Raises:
            ClusterError: a worker cannot do the work.
        """

    @abstractmethod
    def counter(self, advance: Callable[[int], None], n_rows: int) -> CountRows:
        """Return a function that a task calls with the number of rows that it has done.

        The number may be 0, and the task may run in another process. The counts reach `advance`.
        The function may raise, which ends the task: its result is then not needed any more.

        Args:
            advance: function that counts rows.
            n_rows: number of rows that are done when a graph is computed.
        """

    @abstractmethod
    def compute(self, graph: Any) -> Any:
        """Compute a graph and return its result, which must be small.

        Errors of the tasks are raised as they are.

        Raises:
            ClusterError: workers are lost.
        """
