"""A path means one thing, whoever reads it: this package, pyarrow, fsspec, the command line or
Python.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet.core as core
import pytest
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import UsageError
from hydra_pipe.loading import load_pipeline
from hydra_pipe.store.files import local_path, location

PIPELINE = """
import torch
from pathlib import Path
from hydra_pipe import Pipeline

def pipeline(data: Path = Path("x")):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    torch.manual_seed(1)
    sets = [torch.utils.data.TensorDataset(torch.randn(n, 3), torch.arange(n) % 2) for n in (12, 4)]
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Pipeline(model=model, optimizer=optimizer, loss=loss, train=sets[0], test=sets[1],
                    batch_size=4, epochs=1)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a pipeline, which the tests run in; the home directory is another."""
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("pipe.py").write_text(PIPELINE)
    return tmp_path / "here"


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def every_stage(run: str) -> None:
    call("run", "pipe.py", run, "--full")
    call("clean", run, "--method", "hydra-fisher", "--lowest", "2")
    call("report", run)
    assert "healthy" in call("verify", run)
    call("info", run)
    relevance = hydra_pipe.open_run(run).relevance()
    np.testing.assert_array_equal(hydra_pipe.open_run(run).relevance_array()[:], relevance)


@pytest.mark.parametrize(
    "run",
    [
        "exp:1",
        "file:x",
        "gs:z",
        "s3:bkt",
        "hdfs:y/z",
        "a b",
        "x?y#z",
        "100%25",
        "añ ß",
        "./~",
        "x~",
        "./s3:/bkt",
        "1:/x",
    ],
)
def test_a_name_that_others_read_as_a_url_is_a_directory(here: Path, run: str) -> None:
    every_stage(run)
    assert (here / run / "run.json").is_file()
    assert (here / run / "rankings/method=hydra-fisher/matrix").is_dir()


def test_a_tilde_is_the_home_directory_for_the_command_line_and_for_python(tmp_path: Path) -> None:
    every_stage("~/x")
    assert (tmp_path / "home/x/run.json").is_file()
    assert "~" not in os.listdir(tmp_path / "here")
    assert hydra_pipe.open_run(Path("~/x")).path == tmp_path / "home/x"
    (tmp_path / "home/pipe.py").write_text(PIPELINE)
    assert load_pipeline("~/pipe.py", ["data=~/set"]).settings == {"data": tmp_path / "home/set"}
    assert not hydra_pipe.record("pipe.py", "~/x")
    with pytest.raises(UsageError, match=r"there is no such user: write \./~nobody-here/x"):
        location("~nobody-here/x")


@pytest.mark.parametrize(
    ("run", "meant"),
    [
        ("s3:/bkt/x", "s3://bkt/x"),
        ("gs:/bkt/x", "gs://bkt/x"),
        ("S3:/bkt/x", "s3://bkt/x"),
        ("s3:///bkt/x", "s3://bkt/x"),
        ("file:/tmp/x", "file:///tmp/x"),
        ("https:/host/x", "https://host/x"),
        (Path("s3://bkt/x"), "s3://bkt/x"),
    ],
)
def test_a_url_with_another_number_of_slashes_is_refused_before_training(
    here: Path, monkeypatch: pytest.MonkeyPatch, run: str | Path, meant: str
) -> None:
    monkeypatch.setattr("hydra_pipe.training.run.train", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(UsageError, match=f"did you mean {meant}\\?"):
        hydra_pipe.record("pipe.py", run)
    with pytest.raises(UsageError, match=f"did you mean {meant}\\?"):
        hydra_pipe.open_run(run)
    assert f"did you mean {meant}?" in call("run", "pipe.py", str(run), code=2)
    assert [entry for entry in os.listdir(here) if ":" in entry] == []


COMMANDS: dict[str, Callable[[], tuple[str, ...]]] = {
    "run": lambda: ("run", "pipe.py", ""),
    "record": lambda: ("record", "pipe.py", ""),
    "reduce": lambda: ("reduce", ""),
    "export": lambda: ("export", ""),
    "report": lambda: ("report", ""),
    "clean": lambda: ("clean", ""),
    "info": lambda: ("info", ""),
    "verify": lambda: ("verify", ""),
    "prune": lambda: ("prune", ""),
    "probe": lambda: ("probe", "", "pipe.py:pipeline", "--name", "x"),
    "evaluate": lambda: ("evaluate", "pipe.py", "", "lds"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_run_is_refused_by_every_command(here: Path, command: str) -> None:
    told = call(*COMMANDS[command](), code=2)
    assert "hydra-pipe: RUN is empty: name a file or directory" in told
    assert set(os.listdir(here)) <= {"pipe.py", "__pycache__"}


def test_an_empty_path_and_a_null_character_are_refused_everywhere() -> None:
    for text in ("", " ", "\t"):
        with pytest.raises(UsageError, match="RUN is empty"):
            location(text)
        with pytest.raises(UsageError, match="the pipeline file is empty"):
            load_pipeline(text)
    with pytest.raises(UsageError, match="RUN holds a null character"):
        local_path("x\0y", "RUN")


def test_nothing_that_is_given_to_pyarrow_is_a_name() -> None:
    """With pyarrow's own reading of names broken, all tables are written and read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "_resolve_filesystem_and_path", _refused)
        every_stage("run")


def _refused(where: object, *_: object, **__: object) -> tuple[None, object]:
    assert not isinstance(where, str | Path), f"pyarrow was given the name {where}"
    return None, where
