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

# to reach a scheduler, and to see its first worker
CONNECT_SECONDS = 5.0
# what listens at an address to say what it is
_ANSWER_SECONDS = 1.0
# without any worker: a batch system may bring new ones
PATIENCE_SECONDS = 60.0
# of a worker with NumPy, Dask and this package loaded: measured (65 MiB), rounded up
WORKER_RESIDENT_BYTES = 72 * 2**20
# Dask stops giving work to a worker that takes this part of its memory limit, and kills one that takes a little more
_PAUSE = 0.8
_REPORT_EVERY_SECONDS = 0.5
_HERE = {
    # sampling each worker's stack a hundred times a second is for a dashboard, which nobody sees
    "distributed.worker.profile.enabled": False,
    # what a worker is busy with must not make it look lost
    "distributed.scheduler.worker-ttl": None,
}


class _Cluster(Scheduler):
    """What the two have in common: a client, and what it tells."""

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
            # a task that runs again begins at nothing again
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
                f"workers of {self._where} died one after the other at the same task ({_task_name(error)}), the last was "
                f"{error.last_worker.address}: lower --memory, or look into its log"
            ) from error
        except CancelledError as error:
            raise ClusterError(f"{self._where} is gone: start it, and run the same command again") from error
        finally:
            future.cancel()
        return result

    def _wait_for(self, future: Future) -> Any:
        since = time.monotonic()
        while True:
            try:
                return future.result(timeout=1)
            except TimeoutError:
                if future.done():  # just now, or with such an error of its own
                    return future.result()
            if self._has_workers():
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE_SECONDS:
                raise ClusterError(
                    f"{self._where} has had no worker for {PATIENCE_SECONDS:.0f} s: start some, and run the same command again"
                )

    def _has_workers(self) -> bool:
        try:
            return self._client.status == "running" and bool(self._client.scheduler_info()["workers"])
        except OSError:
            return False


class ClusterHere(_Cluster):
    """One process with one thread for each core of this machine, started when needed and stopped when done.

    Dask's own limits on memory are off: the plan keeps each process within its budget.
    """

    _where = "the cluster of this machine"

    def __init__(self, n_workers: int) -> None:
        super().__init__()
        self.workers = Workers(n_workers, processes=True, threads=1, resident_bytes=WORKER_RESIDENT_BYTES)

    def start(self, store: Path, run_id: str, peak_bytes: int) -> None:
        self._stack.enter_context(dask.config.set(_HERE))
        # what goes wrong is raised here; and the cluster's own silence ends before all of it has ended
        self._stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
        with _interrupts_are_for_this_thread():
            cluster = self._stack.enter_context(
                LocalCluster(
                    n_workers=self.workers.count,
                    threads_per_worker=1,
                    processes=True,
                    memory_limit=0,
                    # no dashboard; what tells of its health listens anywhere that is free
                    dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                    silence_logs=logging.CRITICAL,
                )
            )
            self._client = self._stack.enter_context(Client(cluster, set_as_default=False))


class ClusterAt(_Cluster):
    """The workers of the scheduler at an address. As many as they have threads."""

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
                # of any package that Dask knows; those that matter are compared below
                warnings.simplefilter("ignore", VersionMismatchWarning)
                client = Client(self._address, timeout=CONNECT_SECONDS, set_as_default=False)
                self._client = self._stack.enter_context(client)
        except (OSError, ValueError) as error:
            raise self._unanswered(error) from error
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise ClusterError(f"{self._where} has no workers: start some with dask worker {self._address}") from None
        self._check_versions()
        self._told = client.run(_about)
        threads = [told["threads"] for told in self._told.values()]
        resident = max(told["resident_bytes"] for told in self._told.values())
        self.workers = Workers(sum(threads), processes=True, threads=max(threads), resident_bytes=resident)

    def _check_listener(self) -> None:
        """Refuse what is no scheduler: a client would wait for its answer without an end. Raises: ClusterError."""
        try:
            kind = _identity(self._address).get("type")
        except (OSError, ValueError, TypeError, ImportError) as error:
            if not isinstance(error, TimeoutError):
                raise self._unanswered(error) from error
            kind = "web server" if _is_web_server(self._address) else None
        except (MemoryError, EOFError):  # its first bytes were taken for a length, or what it says ends too early
            kind = None
        if kind == "Scheduler":
            return
        found = "what listens there does not talk as one" if kind is None else f"a {kind.lower()} listens there"
        advice = "give the address that `dask scheduler` prints as it starts, such as tcp://host:8786"
        if kind == "web server":
            advice = f"if it is the dashboard of one, {advice}"
        raise ClusterError(f"{self._address} is not a Dask scheduler, {found}: {advice}")

    def _unanswered(self, error: BaseException) -> ClusterError:
        return ClusterError(
            f"{self._where} does not answer within {CONNECT_SECONDS:.0f} s ({_last_line(error)}): check that "
            f"`dask scheduler` runs there, host and port, and that no firewall is between"
        )

    def _check_versions(self) -> None:
        told = self._client.get_versions(packages=["hydra_pipe"])
        here = _versions(told["client"])
        there = {"the scheduler itself": told["scheduler"]} | {f"worker {key}": value for key, value in told["workers"].items()}
        for who, what in there.items():
            for name, version in _versions(what).items():
                if version != here[name]:
                    has = f"has {name} {version}" if version else f"has no {name}"
                    raise ClusterError(
                        f"{self._where}: {who} {has}, here it is {here[name]}: install the same there as here, and start it again"
                    )

    def start(self, store: Path, run_id: str, peak_bytes: int) -> None:
        for address, fault in self._client.run(_fault_of_store, store.absolute(), run_id).items():
            if fault is not None:
                raise ClusterError(
                    f"worker {address} {fault}: the run must be on a file system that all machines share, at the same path"
                )
        for address, told in self._told.items():
            limit = told["memory_limit"]
            if limit and limit * _PAUSE < peak_bytes:
                raise ClusterError(
                    f"worker {address} has a memory limit of {format_bytes(limit)}, of which Dask leaves {_PAUSE:.0%}, and may "
                    f"need {format_bytes(peak_bytes)}: lower --memory to {int(limit * _PAUSE) // 2**20}MiB, or start it "
                    f"with a larger --memory-limit"
                )


def _identity(address: str) -> dict[str, Any]:
    """What Dask's server at an address says of itself.

    Raises:
        TimeoutError: something listens there and does not say.
        OSError, ValueError, TypeError, ImportError: it cannot be connected to.
        MemoryError, EOFError: what it says is not what Dask's servers say.
    """

    async def asked() -> dict[str, Any]:
        comm = await connect(address, timeout=CONNECT_SECONDS, **Security().get_connection_args("client"))
        try:
            told = await send_recv(comm, op="identity")
        finally:
            comm.abort()
        return dict(told)

    async def in_time() -> dict[str, Any]:
        # longer than connecting may take, which then tells what is wrong with it
        return await asyncio.wait_for(asked(), CONNECT_SECONDS + _ANSWER_SECONDS)

    found: list[dict[str, Any] | Exception] = []

    def ask() -> None:
        try:
            found.append(asyncio.run(in_time()))
        except Exception as error:  # noqa: BLE001 - raised by the thread that waits
            found.append(error)

    # A notebook runs a loop in its own thread; and Ctrl-C ends the wait of this one, not of a loop.
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
    """Tells from within a task how many rows it has done, now and then. Each task that runs has a copy of its own."""

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
    """Threads and processes begun meanwhile, and those that they begin, see no Ctrl-C: this thread stops them in good order."""
    # multiprocessing's own process, which would lift the block when it starts. A worker that has to be killed leaves a lock of
    # numcodecs to it; it puts that away, and need not tell anyone
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
    """A worker that has loaded what it needs; a memory limit of 0 is none. Dask knows the parameter by its name."""
    import hydra_pipe.reduction.solvers.sums  # noqa: F401
    from hydra_pipe.units import resident_bytes

    return {
        "threads": dask_worker.state.nthreads,
        "memory_limit": dask_worker.memory_manager.memory_limit or 0,
        "resident_bytes": resident_bytes(),
    }


def _fault_of_store(store: Path, run_id: str) -> str | None:
    """What is wrong with `store` as this worker sees it."""
    import os

    from hydra_pipe.errors import HydraError
    from hydra_pipe.store.gradients import Gradients

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
    """What must be the same everywhere: tasks are pickled here, handed on there."""
    python = ".".join(told["host"]["python"].split(".")[:2])
    packages = told["packages"]
    return {"python": python, "hydra-pipe": packages.get("hydra_pipe")} | {n: packages.get(n) for n in ("dask", "distributed")}


def _task_name(error: KilledWorker) -> str:
    return str(error.task).split("-")[0].strip("_")


def _last_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[-1]
