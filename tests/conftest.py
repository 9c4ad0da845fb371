"""How tests are run, and fixtures that many of them look at."""

import fcntl
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.groups import SLOW, group_of
from support.pipelines import conv_pipeline

import hydra_pipe

# a shell ignores it in what runs in the background, and then so do the commands that tests start to interrupt them
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what the tests of a file share be made once, by one process; and begin with what takes longest."""
    for item in items:
        group = group_of(item)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))
        if group in SLOW:
            item.add_marker(pytest.mark.slow)
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(group_of(item), len(SLOW)))


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Nothing that these processes write has to outlive a power cut. `tests/crash` watches flushes, in processes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A recorded run of `conv_pipeline`, once for each set of options; tests copy it before they change it.

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
            if not (run / "run.json").exists():
                hydra_pipe.record(conv_pipeline(), run, **options)
        return run

    return record


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared data sets; `.ci/run` says where they are."""
    where = os.environ.get("HYDRA_PIPE_DATA")
    if not where:
        pytest.skip("HYDRA_PIPE_DATA does not name the shared data sets")
    return Path(where)
