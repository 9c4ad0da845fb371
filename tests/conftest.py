"""Order of the tests, and fixtures that many of them use."""

import fcntl
import gc
import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.pipelines import conv_pipeline
from support.slow import SLOW

import hydra_pipe

# a shell ignores it in what runs in the background, and then so do the commands that tests start to
# interrupt them
signal.signal(signal.SIGINT, signal.default_int_handler)

# A disk in memory, where the machine has one with room: a run is some hundred small files, each of
# which is renamed into its place, and a disk waits for that.
IN_MEMORY = Path("/dev/shm")
IN_MEMORY_BYTES = 4 * 2**30


def take_memory_for_temporary_files() -> None:
    """Let these processes and theirs make temporary files in memory, if the user names no place."""
    if "TMPDIR" in os.environ or not os.access(IN_MEMORY, os.W_OK):
        return
    if shutil.disk_usage(IN_MEMORY).free > IN_MEMORY_BYTES:
        os.environ["TMPDIR"] = tempfile.tempdir = str(IN_MEMORY)


take_memory_for_temporary_files()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that `make quick` leaves out are not even imported: the trainers alone take ten
    seconds.
    """
    return True if config.option.markexpr == "not slow" and collection_path.stem in SLOW else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest.

    One process runs a whole file, so that what its tests share is made once.
    """
    places = {name: place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path.stem in places:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))


def pytest_collection_finish() -> None:
    """Keep the collector of garbage away from what was imported: it is walked through no more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Nothing that these processes write has to outlive a power cut.

    `tests/crash` watches flushes, in processes of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A recorded run of `conv_pipeline`, once for each set of options; tests copy it before they
    change it.

    All processes of pytest-xdist share what one of them has made.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "recorded"
    shared.mkdir(exist_ok=True)

    def record(**options: object) -> Path:
        name = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:16]
        run = shared / name / "run"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            hydra_pipe.record(conv_pipeline(), run, **options)  # nothing where it was done
        return run

    return record


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared data sets; `.ci/run` says where they are."""
    where = os.environ.get("HYDRA_PIPE_DATA")
    if not where:
        pytest.skip("HYDRA_PIPE_DATA does not name the shared data sets")
    return Path(where)
