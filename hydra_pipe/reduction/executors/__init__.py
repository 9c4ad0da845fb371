"""Executors of a reduction: threads of this process, or worker processes here or elsewhere."""

import os
import re

from hydra_pipe.errors import UsageError, missing_extra
from hydra_pipe.reduction.executors.base import Scheduler
from hydra_pipe.reduction.executors.local import InProcess

# tcp://host:8786, tls://..., or host:8786
_ADDRESS = re.compile(r"([a-z]+://)?[^\s/]+:\d{1,5}/?")


def executor_of(text: str) -> Scheduler:
    """Return the executor that `--scheduler` names. Connects to nothing yet.

    Raises:
        UsageError: `text` names no executor.
        ExtraError: the package `distributed` is missing.
    """
    if text == "threads":
        return InProcess(n_cores())
    if text == "synchronous":
        return InProcess(None)
    if text.lower().startswith(("http://", "https://")):
        raise UsageError(
            f"--scheduler {text} is a web address, such as a scheduler's dashboard: give the "
            "address that workers connect to, which `dask scheduler` prints as it starts, such "
            "as tcp://host:8786"
        )
    if text != "processes" and not _ADDRESS.fullmatch(text):
        raise UsageError(
            f"--scheduler {text} is unknown: choose one of threads, processes, synchronous, or "
            "the address of a Dask "
            f"scheduler, such as tcp://host:8786"
        )
    # distributed takes most of a second to import
    try:
        from hydra_pipe.reduction.executors.distributed import ClusterAt, ClusterHere
    except ImportError as error:
        raise missing_extra(f"--scheduler {text}", "cluster", error) from error

    return ClusterHere(n_cores()) if text == "processes" else ClusterAt(text.rstrip("/"))


def n_cores() -> int:
    """Return the number of cores that this process may use.

    The number of all cores on a system that cannot restrict a process to some of them.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
