"""One writer for each stage of a run."""

import errno
import fcntl
import gc
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hydra_pipe.errors import RunError
from hydra_pipe.store import names
from hydra_pipe.store.files import location
from hydra_pipe.store.run import locks
from hydra_pipe.store.run.locks import LEASE_SECONDS, Lock, one_writer
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import EXPORT, RECORD, REDUCE

# where the system has locks, and where it has none
KINDS = ["flock", "lease", "object store"]


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locks, "_SETTLE_SECONDS", 0.01)
    if request.param == "object store":
        return location(f"memory://{tmp_path.name}/run")
    if request.param == "lease":

        def none(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(fcntl, "flock", none)
    return tmp_path / "run"


def test_a_second_writer_is_refused_by_name_of_the_first(run: Path) -> None:
    with one_writer(run, RECORD):
        with pytest.raises(RunError, match=r"is being written by this very process \(record\)"):
            Lock(run, RECORD)
        with one_writer(run, EXPORT.of("hydra")):  # another stage is another matter
            pass
    with one_writer(run, RECORD):
        pass


def test_nothing_stays_behind(run: Path) -> None:
    with one_writer(run, RECORD):
        assert run.exists()
    assert not run.exists()


def _hold(run: Path, held: Any) -> None:
    lock = Lock(run, RECORD)
    held.set()
    time.sleep(60)
    lock.release()


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "run", held))
    process.start()
    assert held.wait(30)
    with pytest.raises(
        RunError, match=rf"by process {process.pid} on {socket.gethostname()} \(record\)"
    ):
        Lock(tmp_path / "run", RECORD)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    Lock(tmp_path / "run", RECORD).release()


def test_a_child_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    """Workers of a DataLoader outlive a parent that was killed, for a while."""
    lock = Lock(tmp_path / "run", RECORD)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=time.sleep, args=(60,))
    child.start()
    lock._held.close()  # as the system does it for a process that was killed
    Lock(tmp_path / "run", RECORD, take_over=True).release()
    child.kill()
    child.join()


def test_a_lock_that_was_left_without_releasing_it_is_let_go_by_the_next_and_not_by_the_collector(
    run: Path,
) -> None:
    lock = Lock(run, RECORD)
    del lock
    gc.collect()
    assert (run / names.LOCKS / "record.lock").exists()
    Lock(run, EXPORT.of("hydra")).release()
    assert not (run / names.LOCKS / "record.lock").exists()
    assert not any(thread.name == "hydra-pipe lease" for thread in threading.enumerate())
    Lock(run, RECORD).release()


def test_one_that_was_refused_leaves_the_lock_of_its_holder(run: Path) -> None:
    with one_writer(run, RECORD):
        for _ in range(2):
            with pytest.raises(RunError):
                Lock(run, RECORD)
            gc.collect()


def test_a_lock_of_this_process_may_be_taken_over_and_is_lost_to_the_first(run: Path) -> None:
    first = Lock(run, RECORD)
    second = Lock(run, RECORD, take_over=True)
    assert first.lost
    assert not second.lost
    first.release()
    with pytest.raises(RunError):
        Lock(run, RECORD)
    second.release()


@pytest.mark.parametrize(
    ("holder", "free"),
    [
        ({"host": "another", "pid": 1, "time": 0.0}, False),
        ({"host": "another", "pid": 1, "time": -LEASE_SECONDS - 1}, True),
        # beyond the largest process id of Linux
        ({"host": socket.gethostname(), "pid": 2**22 + 1, "time": 0.0}, True),
        ({"host": socket.gethostname(), "pid": os.getppid(), "time": 0.0}, False),
    ],
    ids=["alive elsewhere", "not heard of for long", "dead here", "alive here"],
)
@pytest.mark.parametrize("run", ["lease", "object store"], indirect=True)
def test_a_lease_is_free_when_its_holder_is_gone(
    run: Path, holder: dict[str, Any], free: bool
) -> None:
    file = run / names.LOCKS / "record.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(holder | {"time": time.time() + holder["time"], "token": "x"}))
    if free:
        Lock(run, RECORD).release()
    else:
        with pytest.raises(RunError, match=f"process {holder['pid']} on {holder['host']}"):
            Lock(run, RECORD)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 3000,
        b"[" * 10**6,
        b'{"pid": Infinity, "host": "", "time": 0, "token": ""}',
        b"\xff",
        b'{"pid": 1}',
    ],
    ids=["empty", "deep", "large", "infinite", "not UTF-8", "half"],
)
@pytest.mark.parametrize("run", ["lease"], indirect=True)
def test_a_lease_that_makes_no_sense_is_free(run: Path, content: bytes) -> None:
    file = run / names.LOCKS / "record.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    Lock(run, RECORD).release()


@pytest.mark.parametrize("run", ["lease"], indirect=True)
def test_a_lease_is_renewed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_RENEW_SECONDS", 0.01)
    lock = Lock(run, RECORD)
    file = run / names.LOCKS / "record.lock"
    first = json.loads(file.read_text())["time"]
    deadline = time.monotonic() + 30
    while json.loads(file.read_text())["time"] == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert json.loads(file.read_text())["time"] > first
    lock.release()


def test_two_processes_do_not_lose_each_others_stages(tmp_path: Path) -> None:
    first = RunDirectory.create(tmp_path / "run")
    first.begin(RECORD, {})
    second = RunDirectory.open(tmp_path / "run")
    second.begin(REDUCE.of("hydra"), {})
    first.end(RECORD, "complete", n_rows=3)
    second.end(REDUCE.of("hydra"), "complete")
    found = RunDirectory.open(tmp_path / "run").stages
    assert {name: stage.state for name, stage in found.items()} == {
        RECORD: "complete",
        REDUCE.of("hydra"): "complete",
    }
    assert found[RECORD].facts == {"n_rows": 3}
