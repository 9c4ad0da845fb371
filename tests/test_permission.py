"""Permission to write is tried first: where a stage has none, what was there is as it was, and the
directory is named.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.pipelines import mlp_pipeline
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app

NOBODY = 65534
PIPELINE = Path(__file__).with_name("cli") / "bad_pipelines.py"


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may write everywhere: in this block files are written as by nobody."""
    if os.geteuid():
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def everything(run: Path) -> None:
    hydra_pipe.record(str(PIPELINE), run)
    hydra_pipe.reduce(run, method="hydra")
    hydra_pipe.reduce(run, by="mean", keep_hypergradients=True, method="hydra")
    hydra_pipe.export(run, method="hydra")
    hydra_pipe.clean(run, lowest=2, method="hydra")
    hydra_pipe.report(run)
    hydra_pipe.probe(run, mlp_like(), name="some")
    hydra_pipe.reduce(run, probe="some", method="hydra")


def mlp_like() -> object:
    from hydra_pipe.loading import load_pipeline

    return load_pipeline(str(PIPELINE)).build().test


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A run that nobody may write; pytest's own directories nobody else may enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        everything(Path(directory) / "run")
        yield Path(directory) / "run"


@pytest.fixture
def run(made: Path) -> Iterator[Path]:
    copy = Path(shutil.copytree(made, made.with_name("copy")))
    if not os.geteuid():
        for path in (copy, *copy.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    yield copy
    for directory in (copy, *(path for path in copy.rglob("*") if path.is_dir())):
        directory.chmod(0o755)
    shutil.rmtree(copy)


def snapshot(directory: Path) -> dict[str, str]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


# what is tried, and where nobody may write
Case = tuple[Callable[[Path], object], tuple[str, ...]]
CASES: dict[str, Case] = {
    "record": (
        lambda run: hydra_pipe.record(str(PIPELINE), run, overwrite=True),
        ("gradients.zarr/test", "rankings", "checksums"),
    ),
    "reduce": (
        lambda run: hydra_pipe.reduce(run, overwrite=True, method="hydra"),
        (
            ".",
            "relevance.zarr",
            "relevance.zarr/hydra/c",
            "checksums",
            "rankings",
            "cleaning/method=hydra",
        ),
    ),
    "keep": (
        lambda run: hydra_pipe.reduce(
            run, by="mean", keep_hypergradients=True, overwrite=True, method="hydra"
        ),
        ("hypergradients",),
    ),
    "export": (
        lambda run: hydra_pipe.export(run, overwrite=True, method="hydra"),
        ("rankings", "rankings/method=hydra", "checksums"),
    ),
    "clean": (
        lambda run: hydra_pipe.clean(run, overwrite=True, method="hydra"),
        ("cleaning", "cleaning/method=hydra"),
    ),
    "report": (lambda run: hydra_pipe.report(run, overwrite=True), (".", "checksums")),
    "probe": (
        lambda run: hydra_pipe.probe(run, mlp_like(), name="some", overwrite=True),
        ("probes", "relevance.zarr"),
    ),
    "prune": (hydra_pipe.prune, ("gradients.zarr/gradient", "gradients.zarr/scale/c")),
    "repair": (lambda run: hydra_pipe.verify(run, repair=True), ("gradients.zarr", "checksums")),
}


@pytest.mark.parametrize(
    ("stage", "place"), [(stage, place) for stage, (_, places) in CASES.items() for place in places]
)
def test_without_permission_nothing_that_is_good_is_withdrawn(
    run: Path, stage: str, place: str
) -> None:
    before = snapshot(run)
    (run / place).chmod(0o555)
    with without_privileges(), pytest.raises(PermissionError) as refusal:
        CASES[stage][0](run)
    assert Path(str(refusal.value.filename)).is_relative_to(run / place)
    assert snapshot(run) == before
    (run / place).chmod(0o755)
    assert hydra_pipe.verify(run) == []


def test_the_message_names_the_directory(run: Path) -> None:
    (run / "relevance.zarr").chmod(0o555)
    with without_privileges():
        result = CliRunner().invoke(app, ["reduce", str(run), "--overwrite"])
    assert result.exit_code == 1
    told = result.stderr.strip().splitlines()[-1]
    assert told.startswith(
        f"hydra-pipe: {run}/relevance.zarr: Permission denied: no permission: name a run "
        "directory elsewhere"
    )


def test_a_recording_is_refused_before_training_where_its_directory_cannot_be_made(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_pipe.training.run.train", lambda *_: pytest.fail("it was trained"))
    closed = made.with_name("closed")
    closed.mkdir(mode=0o555)
    with without_privileges(), pytest.raises(PermissionError) as refusal:
        hydra_pipe.record(mlp_pipeline(), closed / "deep" / "run")
    assert refusal.value.filename == str(closed)
    closed.rmdir()
