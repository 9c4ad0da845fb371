"""A run on a web server is read as one on a disk is; it is not written, and what cannot be read
there is told in a sentence.
"""

import functools
import http.server
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.pipelines import conv_pipeline
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import RunError

pytest.importorskip("aiohttp")
pytest.importorskip("upath")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class WithoutListings(Quiet):
    def list_directory(self, _: object) -> None:
        self.send_error(403)


@contextmanager
def served(directory: Path, handler: type[Quiet] = Quiet) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(directory))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, recorded: Callable[..., Path]) -> Path:
    run = Path(shutil.copytree(recorded(), tmp_path_factory.mktemp("web") / "run"))
    hydra_pipe.reduce(run)
    hydra_pipe.export(run)
    return run


def call(*arguments: str, code: int) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_a_run_on_a_web_server_is_read_as_on_a_disk(made: Path) -> None:
    with served(made.parent) as root:
        there, here = hydra_pipe.open_run(f"{root}/run"), hydra_pipe.open_run(made)
        np.testing.assert_array_equal(there.relevance(), here.relevance())
        np.testing.assert_array_equal(there.relevance_array()[:], here.relevance_array()[:])
        assert there.top(3).equals(here.top(3))
        assert there.samples().equals(here.samples())
        assert there.rewind(3).samples.equals(here.rewind(3).samples)
        assert there.spikes().table.equals(here.spikes().table)
        assert there.info() | {"path": None} == here.info() | {"path": None}
        assert hydra_pipe.verify(f"{root}/run") == []
        assert "healthy" in call("verify", f"{root}/run", code=0)
        assert "complete" in call("info", f"{root}/run", code=0)


@pytest.mark.parametrize(
    "command",
    [
        ("reduce", "--overwrite"),
        ("reduce", "--mean"),
        ("export", "--overwrite"),
        ("clean",),
        ("verify", "--repair"),
    ],
)
def test_what_writes_is_refused_on_a_web_server(made: Path, command: tuple[str, ...]) -> None:
    with served(made.parent) as root:
        told = call(command[0], f"{root}/run", *command[1:], code=1)
    assert told.splitlines()[-1].endswith(
        "is on a web server, which can be read only (info, verify, hydra_pipe.open_run): copy "
        "the run to a disk, or name an object "
        "store such as s3://bucket/run"
    )


def test_recording_on_a_web_server_is_refused_before_training(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_pipe.training.run.train", lambda *_: pytest.fail("it was trained"))
    with (
        served(made.parent) as root,
        pytest.raises(RunError, match="is on a web server, which can be read only"),
    ):
        hydra_pipe.record(conv_pipeline(), f"{root}/new")


def test_what_cannot_be_read_from_a_web_server_is_told(made: Path) -> None:
    with (
        served(made.parent) as root,
        pytest.raises(
            RunError, match=r"there is no run at .*/none: the web server has no run\.json"
        ),
    ):
        hydra_pipe.open_run(f"{root}/none")
    with (
        served(made.parent, WithoutListings) as root,
        pytest.raises(RunError, match="does not list its directories"),
    ):
        hydra_pipe.open_run(f"{root}/run")
    with pytest.raises(
        RunError, match=r"cannot be read \(.*check the address, and that the web server runs"
    ):
        hydra_pipe.open_run("http://127.0.0.1:1/run")
