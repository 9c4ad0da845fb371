"""What every executor of a reduction is, and the workers that it has."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

CountRows = Callable[[int], None]


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
