"""The same relevance whatever computes it: threads, processes, workers of a Dask scheduler; also
where one of them is killed.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from dask.delayed import delayed
from distributed import Client
from support import ROOT
from support.compare import relative_error
from support.pipelines import conv_pipeline, images
from support.truth import oracle_relevance, read_relevance

import hydra_pipe
from hydra_pipe.errors import ClusterError, UsageError
from hydra_pipe.plan import chunking
from hydra_pipe.progress import Progress, Task
from hydra_pipe.reduction import executors
from hydra_pipe.reduction.executors import distributed
from hydra_pipe.reduction.job import ReductionJob
from hydra_pipe.reduction.solvers import sums as sums_module
from hydra_pipe.store.data import relevance
from hydra_pipe.store.data.probes import WhichTests

ORDERS = ("score first", "fold first")
PATIENCE = 60.0


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return oracle_relevance(conv_pipeline())


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording in several shards, so that two workers have work."""
    path = tmp_path_factory.mktemp("schedulers") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CHUNK_FEATURES", 100)
        patch.setattr(chunking, "SHARD_BYTES", 16 * 400 * 4)
        patch.setattr(chunking, "CHUNK_BYTES", 4 * 100 * 4)
        hydra_pipe.record(conv_pipeline(), path, encoding="auto", dim=100_000, dtype="float32")
    return path


@pytest.fixture
def recording(small_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_shards, tmp_path / "run"))


class Cluster:
    """`dask scheduler` and two `dask worker`, started as a user starts them."""

    def __init__(self, directory: Path) -> None:
        self.hold = directory / "hold"
        self.hold.mkdir()
        self._directory = directory
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HYDRA_PIPE_TEST_HOLD": str(self.hold),
        }
        self._started: list[subprocess.Popen[bytes]] = []
        self._start(
            "scheduler", "--port", "0", "--scheduler-file", str(directory / "scheduler.json")
        )
        file = directory / "scheduler.json"
        # it appears before it is written
        until(lambda: file.exists() and file.read_text().rstrip().endswith("}"))
        self.address: str = json.loads(file.read_text())["address"]

    def _start(self, *arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "dask",
            *arguments,
            "--host",
            "127.0.0.1",
            "--no-dashboard",
        ]
        with open(self._directory / f"{len(self._started)}.log", "wb") as log:
            # not where the test runs: only absolute paths lead to the run
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, cwd=self._directory
            )
        self._started.append(process)

    def start_workers(self, n: int, *options: str) -> None:
        for _ in range(n):
            self._start("worker", self.address, "--nthreads", "1", *options)

    def wait_for_workers(self) -> None:
        """Until there are two: where one was killed, its nanny starts another."""
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=PATIENCE)

    def stop(self) -> None:
        """At once: asked to end, Dask takes seconds. Nannies before their workers, which they would
        start again.
        """
        for process in reversed(self._started):
            for part in (process, *psutil.Process(process.pid).children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    part.kill()
            process.wait()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        found.start_workers(
            2, "--memory-limit", "8GiB", "--preload", str(Path(__file__).parent / "hold.py")
        )
        found.wait_for_workers()
        yield found
    finally:
        found.stop()


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Counted(Progress):
    """Keeps what was counted."""

    def __init__(self) -> None:
        self.done = 0

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Task]:
        counted, self.total = self, total

        class Counting(Task):
            def advance(self, n: int) -> None:
                counted.done += n

        yield Counting()


def workers_left() -> list[psutil.Process]:
    """Processes that this one has started, but for the cluster above, and for multiprocessing's
    own, which stays until the end.
    """
    return [
        child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())
    ]


def in_order(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Have the plan take one order, by two workers, in several passes, and the few samples in
    several chunks and shares.
    """
    original = sums_module.plan_sums

    def asked(*args):
        found = dataclasses.replace(original(*args), order=order, test_blocks=((0, 4), (4, 7)))
        assert len(found.row_runs) > 1
        if order == "fold first":
            found = dataclasses.replace(found, sample_blocks=((0, 16), (16, 26)))
        return found

    monkeypatch.setattr(sums_module, "plan_sums", asked)
    monkeypatch.setattr(executors, "n_cores", lambda: 2)
    monkeypatch.setattr(sums_module, "SAMPLE_MULTIPLE", 8)
    monkeypatch.setattr(relevance, "CHUNK_SAMPLES", 8)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes", "address"])
def test_relevance_is_the_oracles_on_any_scheduler(
    recording: Path,
    truth: np.ndarray,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    scheduler: str,
    order: str,
) -> None:
    if scheduler == "address":
        scheduler = request.getfixturevalue("two_workers").address
    if scheduler != "synchronous":
        in_order(monkeypatch, order)
    monkeypatch.chdir(recording.parent)
    progress = Counted()
    hydra_pipe.reduce("run", scheduler=scheduler, progress=progress, method="hydra")
    assert relative_error(read_relevance(recording), truth) < 1e-4
    assert progress.done == progress.total
    assert not hydra_pipe.reduce("run", scheduler="127.0.0.1:1", method="hydra"), (
        "where nothing is to do nothing is connected to"
    )
    assert scheduler != "processes" or workers_left() == []


def test_a_probe_is_answered_by_processes_as_in_this_one(
    recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recording.parent)
    in_order(monkeypatch, "score first")
    hydra_pipe.probe("run", images(7, 3), name="late", pipeline=conv_pipeline())
    found = {}
    for scheduler in ("threads", "processes"):
        assert hydra_pipe.reduce(
            "run", probe="late", scheduler=scheduler, overwrite=True, method="hydra"
        )
        found[scheduler] = np.asarray(hydra_pipe.open_run("run").relevance("hydra-of-late"))
    assert np.abs(found["threads"]).max() > 0
    assert relative_error(found["processes"], found["threads"]) < 1e-6
    assert hydra_pipe.verify("run") == []


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("point", ["_add_scores", "_add", "write_relevance"])
def test_a_worker_that_is_killed_costs_nothing_but_time(
    recording: Path,
    truth: np.ndarray,
    two_workers: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    point: str,
) -> None:
    """In the middle of its rows, of adding up, of writing: whatever it did is done again, from what
    is as it was.
    """
    in_order(monkeypatch, order)
    two_workers.wait_for_workers()
    for left in two_workers.hold.glob(f"{point}*"):
        left.unlink()
    (two_workers.hold / point).touch()
    failed: list[BaseException] = []
    progress = Counted()

    def reduce() -> None:
        try:
            hydra_pipe.reduce(
                recording, scheduler=two_workers.address, progress=progress, method="hydra"
            )
        except BaseException as error:  # noqa: BLE001 - of the thread
            failed.append(error)

    reducing = threading.Thread(target=reduce)
    reducing.start()
    try:
        held = two_workers.hold / f"{point}.pid"
        until(lambda: held.exists() or not reducing.is_alive())
        assert reducing.is_alive(), failed
        os.kill(int(held.read_text()), signal.SIGKILL)
    finally:
        (two_workers.hold / point).unlink()
        reducing.join(PATIENCE)
    assert not reducing.is_alive()
    assert failed == []
    assert relative_error(read_relevance(recording), truth) < 1e-4
    assert progress.done == progress.total


def test_adding_up_for_a_cluster_changes_no_partial_sum() -> None:
    """Few at once, in shares or not: the same total, and what it was made of as it was."""
    generator = np.random.default_rng(0)
    partials = [
        (generator.random((20, 3), np.float32), generator.random((20, 2), np.float32))
        for _ in range(7)
    ]
    before = [tuple(array.copy() for array in sums) for sums in partials]
    inputs = [delayed(sums, pure=False) for sums in partials]
    for n_chunks in (1, 3, 40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sums_module, "SAMPLE_MULTIPLE", -(-20 // n_chunks))
            job = ReductionJob(
                Path(), WhichTests(0), Path(), 20, (), None, None, None, None, in_place=False
            )  # type: ignore[arg-type] # the plan is not asked
            found = [
                (share, sums.compute(scheduler="synchronous"))
                for share, sums in sums_module._totals(job, inputs, (100, 120))
            ]
        assert found[0][0][0] == 100
        assert found[-1][0][1] == 120
        for number, parts in enumerate(zip(*before, strict=True)):
            whole = np.concatenate([sums[number] for _, sums in found])
            np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-6)
    for sums, old in zip(partials, before, strict=True):
        for array, same in zip(sums, old, strict=True):
            np.testing.assert_array_equal(array, same)


def test_the_cluster_of_this_machine_is_stopped_after_an_error(
    recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "n_cores", lambda: 1)
    (recording / "gradients.zarr" / "gradient" / "c" / "0" / "0").write_bytes(b"rotten" * 100)
    with pytest.raises(hydra_pipe.HydraError, match="is not readable"):
        hydra_pipe.reduce(recording, scheduler="processes", method="hydra")
    assert workers_left() == []


def test_an_interrupted_command_leaves_no_process_behind(recording: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to every process of the terminal."""
    (tmp_path / "hold").mkdir()
    (tmp_path / "hold" / "_add_scores").touch()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HYDRA_PIPE_TEST_HOLD": str(tmp_path / "hold"),
        "DASK_DISTRIBUTED__WORKER__PRELOAD": str(Path(__file__).parent / "hold.py"),
    }
    command = [
        sys.executable,
        "-m",
        "hydra_pipe.cli.app",
        "reduce",
        str(recording),
        "--method",
        "hydra",
        "--scheduler",
        "processes",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        until(
            lambda: (tmp_path / "hold" / "_add_scores.pid").exists() or process.poll() is not None
        )
        assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 130
        assert told.splitlines()[-1].startswith("hydra-pipe: interrupted"), told
        assert "Traceback" not in told
        until(lambda: not any(child.is_running() for child in children))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def refused(recording: Path, address: str, **options: object) -> str:
    with pytest.raises(ClusterError) as refusal:
        hydra_pipe.reduce(recording, scheduler=address, **options)  # type: ignore[arg-type]
    message = str(refusal.value)
    assert "\n" not in message
    assert "reduce hydra" not in json.loads((recording / "run.json").read_text())["stages"]
    return message


def test_a_scheduler_that_is_none_is_told(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("tcp", "host", "tcp://", "tcp://host"):
        with pytest.raises(
            UsageError, match=f"--scheduler {text} is unknown: choose one of threads, processes"
        ):
            hydra_pipe.reduce(recording, scheduler=text, method="hydra")
    monkeypatch.setattr(distributed, "CONNECT_SECONDS", 0.5)
    told = refused(recording, "tcp://127.0.0.1:1")
    assert "the scheduler at tcp://127.0.0.1:1 does not answer within" in told
    assert "check that `dask scheduler` runs there" in told


class Impostor:
    """Listens at an address, and is no scheduler: it says `first` at once, or `answer` to whoever
    asks, or nothing.
    """

    def __init__(self, first: bytes = b"", answer: bytes = b"", *, closes: bool = False) -> None:
        self._first, self._answer, self._closes = first, answer, closes
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._socket.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection = self._socket.accept()[0]
                self._open.append(connection)
                connection.sendall(self._first)
                if self._closes:
                    connection.close()
                elif self._answer and b"HTTP" in connection.recv(64):
                    connection.sendall(self._answer)

    def __enter__(self) -> "Impostor":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self._open:
            connection.close()
        self._thread.join()


IMPOSTORS = {
    "silent": (Impostor, {}, "is not a Dask scheduler, the program there answers in another way"),
    "web server": (
        Impostor,
        {"answer": b"HTTP/1.0 200 OK\r\n\r\n"},
        "a web server listens there: if it is a scheduler's dashboard",
    ),
    "talks otherwise": (Impostor, {"first": b"SSH-2.0-OpenSSH_9.6\r\n"}, "tcp://127.0.0.1:"),
    "hangs up": (Impostor, {"closes": True}, "tcp://127.0.0.1:"),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_what_is_no_scheduler_is_refused_within_seconds(
    recording: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, options, message = IMPOSTORS[name]
    monkeypatch.setattr(distributed, "CONNECT_SECONDS", 1.0)
    with kind(**options) as impostor:
        start = time.monotonic()
        told = refused(recording, impostor.address)
        assert time.monotonic() - start < 10
    assert message in told
    assert "dask scheduler" in told


def test_the_address_of_a_worker_and_of_a_dashboard_are_told(
    recording: Path, two_workers: Cluster
) -> None:
    with Client(two_workers.address, set_as_default=False) as client:
        worker = next(iter(client.scheduler_info()["workers"]))
    assert "is not a Dask scheduler, a worker listens there" in refused(recording, worker)
    with pytest.raises(
        UsageError,
        match=r"http://127\.0\.0\.1:8787 is a web address, such as a scheduler's dashboard",
    ):
        hydra_pipe.reduce(recording, scheduler="http://127.0.0.1:8787", method="hydra")


def test_ctrl_c_ends_the_wait_for_a_scheduler_at_once(recording: Path) -> None:
    with Impostor() as impostor:
        command = [
            sys.executable,
            "-m",
            "hydra_pipe.cli.app",
            "reduce",
            str(recording),
            "--scheduler",
            impostor.address,
        ]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        }
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            until(lambda: bool(impostor._open) or process.poll() is not None)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            told = process.communicate(timeout=PATIENCE)[1]
            assert time.monotonic() - start < 3
            assert process.returncode == 130
            assert told.splitlines() == [
                "hydra-pipe: interrupted: finished work is kept; run the same command again "
                "to resume"
            ]
        finally:
            process.kill()


def test_a_scheduler_without_workers_is_told(
    recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Cluster(tmp_path)
    try:
        monkeypatch.setattr(distributed, "CONNECT_SECONDS", 1.0)
        told = refused(recording, alone.address)
        assert told == (
            f"the scheduler at {alone.address} has no workers: start some with dask worker "
            f"{alone.address}"
        )
    finally:
        alone.stop()


def test_workers_that_cannot_do_it_are_told(
    recording: Path, two_workers: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = Client.get_versions
    for found, message in (
        ("0.0.9", "has hydra-pipe 0.0.9, here it is 0.1.0"),
        (None, "has no hydra-pipe, here it is 0.1.0"),
    ):

        def of_another(*args: Any, found: str | None = found, **kwargs: Any) -> dict[str, Any]:
            told = versions(*args, **kwargs)
            next(iter(told["workers"].values()))["packages"]["hydra_pipe"] = found
            return told

        with monkeypatch.context() as patch:
            patch.setattr(Client, "get_versions", of_another)
            told = refused(recording, two_workers.address)
            assert re.search(
                rf"worker tcp://\S+ {message}: install the same there as here, and start it again$",
                told,
            )
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "_PAUSE", 0.001)
        told = refused(recording, two_workers.address)
        assert re.match(
            r"worker tcp://\S+ has a memory limit of 8 GiB, .* lower --memory to 8MiB", told
        )
    # what they see is another run, or nothing: the store is elsewhere for them
    with monkeypatch.context() as patch:
        patch.setattr(Path, "absolute", lambda path: Path("/nowhere") / path.name)
        told = refused(recording, two_workers.address)
        assert re.match(
            r"worker tcp://127.0.0.1:\d+ does not see /nowhere/gradients.zarr: the run must be "
            r"on a file system",
            told,
        )


def test_threads_need_no_distributed() -> None:
    """It takes most of a second to import; Dask itself does it where a scheduler is named and not
    given.
    """
    code = (
        "import sys; from dask.delayed import delayed; from hydra_pipe.reduction.executors "
        "import executor_of; "
        "executor_of('threads').compute(delayed(int)(3)); sys.exit('distributed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
