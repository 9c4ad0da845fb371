"""Worker processes that dask.distributed schedules: started here, or found at an address."""

import asyncio
import logging
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Self

import dask
from distributed import CancelledError, Client, Future, KilledWorker, LocalCluster, get_worker
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.core import connect, send_recv
from distributed.security import Security
from distributed.utils import silence_logging_cmgr
from distributed.versions import VersionMismatchWarning

from hydra_pipe.errors import ClusterError
from hydra_pipe.reduction.executors.base import CountRows, Scheduler, Workers
from hydra_pipe.units import format_bytes

# time limit for reaching a scheduler, and for its first worker to appear
CONNECT_SECONDS = 5.0
# time limit for the listener at an address to say what it is
_ANSWER_SECONDS = 1.0
# time limit for being without any worker: a batch system may start new ones
PATIENCE_SECONDS = 60.0
# memory of a worker with NumPy, Dask and this package loaded: measured (65 MiB), rounded up
WORKER_RESIDENT_BYTES = 72 * 2**20
# Dask stops giving work to a worker that takes this part of its memory limit, and kills a worker
# that takes a little more
_PAUSE = 0.8
_REPORT_EVERY_SECONDS = 0.5
_HERE = {
    # a worker's stack is sampled 100 times a second for the dashboard, and there is no dashboard
    "distributed.worker.profile.enabled": False,
    # a worker in a long task must not count as lost
    "distributed.scheduler.worker-ttl": None,
}


class _Cluster(Scheduler):
    """Common base of the two cluster executors: a Dask client and its progress reports."""

    _client: Client
    _where: str

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._end_pass: Callable[[], None] = lambda: None

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def counter(self, advance: Callable[[int], None], n_rows: int) -> CountRows:
        topic = f"hydra-pipe {uuid.uuid4().hex}"
        done: dict[str, int] = {}

        def show(event: tuple[float, Any]) -> None:
            key, n_done = event[1]
            # a task that runs again counts from 0 again
            advance(n_done - done.get(key, 0))
            done[key] = n_done

        def end_pass() -> None:
            advance(n_rows - sum(done.values()))
            done.clear()

        self._client.subscribe_topic(topic, show)
        self._end_pass = end_pass
        return _Reporter(topic)

    def compute(self, graph: Any) -> Any:
        future = self._client.compute(graph)
        try:
            result = self._wait_for(future)
            self._end_pass()
        except KilledWorker as error:
            raise ClusterError(
                f"workers of {self._where} died one after the other at the same task "
                f"({_task_name(error)}), the last was "
                f"{error.last_worker.address}: lower --memory, or look into its log"
            ) from error
        except CancelledError as error:
            raise ClusterError(
                f"{self._where} is gone: start it, and run the same command again"
            ) from error
        finally:
            future.cancel()
        return result

    def _wait_for(self, future: Future) -> Any:
        since = time.monotonic()
        while True:
            try:
                return future.result(timeout=1)
            except TimeoutError:
                # it may have ended just now, or its own error may be a TimeoutError
                if future.done():
                    return future.result()
            if self._has_workers():
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE_SECONDS:
                raise ClusterError(
                    f"{self._where} has had no worker for {PATIENCE_SECONDS:.0f} s: start some, "
                    "and run the same command again"
                )

    def _has_workers(self) -> bool:
        try:
            return self._client.status == "running" and bool(
                self._client.scheduler_info()["workers"]
            )
        except OSError:
            return False


class ClusterHere(_Cluster):
    """Cluster on this machine: one process with one thread for each core.

    The processes start when they are needed and stop at the end. Dask's own memory limits are off,
    because the plan keeps each process within its budget.

    Args:
        n_workers: number of processes.
    """

    _where = "the cluster of this machine"

    def __init__(self, n_workers: int) -> None:
        super().__init__()
        self.workers = Workers(
            n_workers, processes=True, threads=1, resident_bytes=WORKER_RESIDENT_BYTES
        )

    def start(self, store: Path, run_id: str, peak_bytes: int) -> None:
        self._stack.enter_context(dask.config.set(_HERE))
        # errors are raised here, so logs are not needed; the cluster's own silence_logs ends before
        # the whole cluster has stopped
        self._stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
        with _interrupts_are_for_this_thread():
            cluster = self._stack.enter_context(
                LocalCluster(
                    n_workers=self.workers.count,
                    threads_per_worker=1,
                    processes=True,
                    memory_limit=0,
                    # no dashboard; the health endpoint still needs a port, any free one
                    dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                    silence_logs=logging.CRITICAL,
                )
            )
            self._client = self._stack.enter_context(Client(cluster, set_as_default=False))


class ClusterAt(_Cluster):
    """Cluster of the Dask scheduler at an address. Every thread of its processes is a worker.

    Args:
        address: address of the scheduler, such as tcp://host:8786.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self._where = f"the scheduler at {address}"
        self._address = address

    def __enter__(self) -> Self:
        try:
            self._connect()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _connect(self) -> None:
        self._stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
        self._check_listener()
        try:
            with warnings.catch_warnings():
                # the warning covers every package that Dask knows; `_check_versions` compares those
                # that matter
                warnings.simplefilter("ignore", VersionMismatchWarning)
                client = Client(self._address, timeout=CONNECT_SECONDS, set_as_default=False)
                self._client = self._stack.enter_context(client)
        except (OSError, ValueError) as error:
            raise self._unanswered(error) from error
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise ClusterError(
                f"{self._where} has no workers: start some with dask worker {self._address}"
            ) from None
        self._check_versions()
        self._told = client.run(_about)
        threads = [told["threads"] for told in self._told.values()]
        resident = max(told["resident_bytes"] for told in self._told.values())
        self.workers = Workers(
            sum(threads), processes=True, threads=max(threads), resident_bytes=resident
        )

    def _check_listener(self) -> None:
        """Refuse a listener that is no scheduler. Raises: ClusterError.

        A client would wait for its answer without end.
        """
        try:
            kind = _identity(self._address).get("type")
        except (OSError, ValueError, TypeError, ImportError) as error:
            if not isinstance(error, TimeoutError):
                raise self._unanswered(error) from error
            kind = "web server" if _is_web_server(self._address) else None
        # the first bytes of the answer were read as a length, or the answer ends too early
        except (MemoryError, EOFError):
            kind = None
        if kind == "Scheduler":
            return
        found = (
            "the program there answers in another way"
            if kind is None
            else f"a {kind.lower()} listens there"
        )
        advice = (
            "give the address that `dask scheduler` prints as it starts, such as tcp://host:8786"
        )
        if kind == "web server":
            advice = f"if it is a scheduler's dashboard, {advice}"
        raise ClusterError(f"{self._address} is not a Dask scheduler, {found}: {advice}")

    def _unanswered(self, error: BaseException) -> ClusterError:
        return ClusterError(
            f"{self._where} does not answer within {CONNECT_SECONDS:.0f} s "
            f"({_last_line(error)}): check that "
            f"`dask scheduler` runs there, host and port, and that no firewall is between"
        )

    def _check_versions(self) -> None:
        told = self._client.get_versions(packages=["hydra_pipe"])
        here = _versions(told["client"])
        there = {"the scheduler itself": told["scheduler"]} | {
            f"worker {key}": value for key, value in told["workers"].items()
        }
        for who, what in there.items():
            for name, version in _versions(what).items():
                if version != here[name]:
                    has = f"has {name} {version}" if version else f"has no {name}"
                    raise ClusterError(
                        f"{self._where}: {who} {has}, here it is {here[name]}: install the same "
                        "there as here, and start it again"
                    )

    def start(self, store: Path, run_id: str, peak_bytes: int) -> None:
        for address, fault in self._client.run(_fault_of_store, store.absolute(), run_id).items():
            if fault is not None:
                raise ClusterError(
                    f"worker {address} {fault}: the run must be on a file system that all "
                    "machines share, at the same path"
                )
        for address, told in self._told.items():
            limit = told["memory_limit"]
            if limit and limit * _PAUSE < peak_bytes:
                raise ClusterError(
                    f"worker {address} has a memory limit of {format_bytes(limit)}, of which "
                    f"Dask leaves {_PAUSE:.0%}, and may "
                    f"need {format_bytes(peak_bytes)}: lower --memory to "
                    f"{int(limit * _PAUSE) // 2**20}MiB, or start it "
                    f"with a larger --memory-limit"
                )


def _identity(address: str) -> dict[str, Any]:
    """Ask the Dask server at an address for its description of itself.

    Raises:
        TimeoutError: something listens there and does not answer.
        OSError, ValueError, TypeError, ImportError: there is no connection to it.
        MemoryError, EOFError: the answer is not that of a Dask server.
    """

    async def asked() -> dict[str, Any]:
        comm = await connect(
            address, timeout=CONNECT_SECONDS, **Security().get_connection_args("client")
        )
        try:
            told = await send_recv(comm, op="identity")
        finally:
            comm.abort()
        return dict(told)

    async def in_time() -> dict[str, Any]:
        # longer than the limit of connecting, so that connecting raises its own, clearer error
        return await asyncio.wait_for(asked(), CONNECT_SECONDS + _ANSWER_SECONDS)

    found: list[dict[str, Any] | Exception] = []

    def ask() -> None:
        try:
            found.append(asyncio.run(in_time()))
        except Exception as error:  # noqa: BLE001 - the waiting thread raises it
            found.append(error)

    # A separate thread, for two reasons: a notebook already runs an event loop in its thread, and
    # Ctrl-C ends the wait of this thread, not that of an event loop.
    thread = threading.Thread(target=ask, name="hydra-pipe connecting", daemon=True)
    thread.start()
    thread.join()
    (told,) = found
    if isinstance(told, Exception):
        raise told
    return told


def _is_web_server(address: str) -> bool:
    try:
        host, port = parse_host_port(parse_address(address)[1])
        with socket.create_connection((host, port), timeout=_ANSWER_SECONDS) as connection:
            connection.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
            return connection.recv(5) == b"HTTP/"
    except (OSError, ValueError):
        return False


class _Reporter:
    """Counter of the rows that a task has done, reported now and then.

    Each running task has its own copy.

    Args:
        topic: topic of the scheduler's events that receives the counts.
    """

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._done = 0
        self._last = 0.0

    def __call__(self, n_rows: int) -> None:
        self._done += n_rows
        now = time.monotonic()
        if now - self._last >= _REPORT_EVERY_SECONDS:
            self._last = now
            worker = get_worker()
            worker.log_event(self._topic, [str(worker.get_current_task()), self._done])


@contextmanager
def _interrupts_are_for_this_thread() -> Iterator[None]:
    """Hide Ctrl-C from threads and processes that start meanwhile, and from those that they start.

    Only this thread sees it, and stops the others in good order.
    """
    # Start the resource tracker of multiprocessing now: its start would lift the block of the
    # signal. A killed worker leaves a lock of numcodecs to the tracker. The tracker removes the
    # lock and would warn about it, which nobody needs.
    sys.warnoptions.append("ignore:resource_tracker")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove("ignore:resource_tracker")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _about(dask_worker: Any) -> dict[str, int]:
    """Describe a worker, after it has loaded the modules that it needs.

    A memory limit of 0 means no limit. Dask passes the worker because of the parameter's name.
    """
    import hydra_pipe.reduction.solvers.sums  # noqa: F401
    from hydra_pipe.units import resident_bytes

    return {
        "threads": dask_worker.state.nthreads,
        "memory_limit": dask_worker.memory_manager.memory_limit or 0,
        "resident_bytes": resident_bytes(),
    }


def _fault_of_store(store: Path, run_id: str) -> str | None:
    """Return the fault of `store` as this worker sees it. None if there is none."""
    import os

    from hydra_pipe.errors import HydraError
    from hydra_pipe.store.data.gradients import Gradients

    try:
        found = Gradients(store).run_id
    except (HydraError, OSError) as error:
        return f"cannot read {store} ({error})" if store.exists() else f"does not see {store}"
    if found != run_id:
        return f"has another run at {store}"
    if isinstance(store, Path) and not os.access(store.parent, os.W_OK):
        return f"may not write in {store.parent}"
    return None


def _versions(told: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the versions that must be equal everywhere.

    Tasks are pickled in this process and unpickled in others.
    """
    python = ".".join(told["host"]["python"].split(".")[:2])
    packages = told["packages"]
    return {"python": python, "hydra-pipe": packages.get("hydra_pipe")} | {
        n: packages.get(n) for n in ("dask", "distributed")
    }


def _task_name(error: KilledWorker) -> str:
    return str(error.task).split("-")[0].strip("_")


def _last_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[-1]
