"""The command line does its work whatever its standard streams are: of another encoding, closed,
full, or no longer read.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from torch.utils.data import TensorDataset

import hydra_pipe
from hydra_pipe.progress import ConsoleProgress

COMMAND = f"{sys.executable} -m hydra_pipe"
# a name and labels that Latin-1 lacks
NAME = "漢字 ß"


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.pipelines import images, mlp_pipeline

    run = tmp_path_factory.mktemp("streams") / NAME
    train, test = images(40, 1), images(9, 2)
    assert isinstance(train, TensorDataset)
    labels = [[f"{NAME}{int(target)}" for target in data.tensors[1]] for data in (train, test)]
    hydra_pipe.record(mlp_pipeline(sample_labels=labels[0], test_labels=labels[1]), run)
    hydra_pipe.reduce(run, method="hydra")
    return run


@pytest.fixture
def run(recorded_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded_run, tmp_path / NAME))


def shell(script: str, run: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`script` in bash, with `RUN` and `HYDRA` in it put in."""
    settings = (
        os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        | environment
    )
    script = script.replace("HYDRA", COMMAND).replace("RUN", f"'{run}'")
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, env=settings, timeout=120, check=False
    )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_an_encoding_lacks_is_replaced(run: Path, encoding: str) -> None:
    for command in ("info", "clean --lowest 3", "export --method hydra"):
        verb, _, options = command.partition(" ")
        result = shell(f"HYDRA {verb} RUN {options}", run, PYTHONIOENCODING=encoding)
        assert result.returncode == 0, result.stderr
        assert result.stdout
        assert b"UnicodeEncodeError" not in result.stderr
    assert b"?? " in shell("HYDRA info RUN", run, PYTHONIOENCODING=encoding).stdout


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_closed_stream_fails_no_work(run: Path, closed: str) -> None:
    for command in ("reduce --overwrite", "info"):
        verb, _, options = command.partition(" ")
        assert shell(f"HYDRA {verb} RUN {options} {closed}", run).returncode == 0, (command, closed)
    assert hydra_pipe.verify(run) == []  # and nothing was printed into a file


@pytest.mark.parametrize("command", ["info RUN", "verify RUN", "--help"])
def test_a_reader_that_has_seen_enough_hears_nothing(run: Path, command: str) -> None:
    for reader in ("true", "head -c 1 > /dev/null"):
        result = shell(f"HYDRA {command} | {reader}", run)
        assert [
            line for line in result.stderr.splitlines() if not line.startswith(b"verify:")
        ] == []


def test_progress_that_nobody_reads_fails_no_work(run: Path) -> None:
    assert (
        shell(
            "(HYDRA reduce RUN --overwrite; echo $? > RUN.code) 2>&1 >/dev/null | true", run
        ).returncode
        == 0
    )
    assert run.with_name(f"{run.name}.code").read_text() == "0\n"
    assert hydra_pipe.verify(run) == []


def test_output_that_cannot_be_written_is_told_in_one_line(run: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    result = shell("HYDRA info RUN > /dev/full", run)
    assert result.returncode == 1
    assert result.stderr.startswith(b"hydra-pipe: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_library_call_shows_no_progress_where_there_is_no_stream(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert hydra_pipe.reduce(run, overwrite=True, progress=ConsoleProgress(), method="hydra")


def test_the_version_is_told_by_the_command_and_by_the_module(tmp_path: Path) -> None:
    expected = f"hydra-pipe {importlib.metadata.version('hydra-pipe')}\n"
    assert shell("HYDRA --version", tmp_path).stdout.decode() == expected
    assert (
        shell(f"{sys.executable} -m hydra_pipe.cli.app --version", tmp_path).stdout.decode()
        == expected
    )
    assert b"reduce" in shell("HYDRA --help", tmp_path).stdout
