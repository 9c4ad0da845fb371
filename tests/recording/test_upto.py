"""The first steps of a recording: while it goes on, after it was interrupted, and when it is
complete.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pytest
from support.compare import relative_error
from support.pipelines import conv_pipeline
from support.processes import record_and_die
from support.small_files import make_files_small

import hydra_pipe
from hydra_pipe.errors import HydraError, RunError, StoreError, UsageError
from hydra_pipe.progress import Progress, Task
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import EXPORT, RECORD, REDUCE

# of an epoch of 26 samples in batches of 8
STEPS = 4


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    make_files_small(monkeypatch.setattr)


def relevance(run: Path, method: str = "hydra") -> np.ndarray:
    return np.asarray(hydra_pipe.open_run(run).relevance(method))


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The relevance of a training that ends after its first epoch."""
    run = tmp_path_factory.mktemp("one") / "run"
    hydra_pipe.record(constant(1), run)
    hydra_pipe.reduce(run, method="hydra")
    return relevance(run)


def constant(epochs: int) -> hydra_pipe.Pipeline:
    """Without a schedule, which would depend on the number of epochs."""
    pipeline = conv_pipeline(epochs=epochs)
    pipeline.scheduler = None
    return pipeline


class During(Progress):
    """Calls something once so many rows are done, in the middle of a recording."""

    def __init__(self, n_rows: int, call: object) -> None:
        self.left, self.call = n_rows, call

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Task]:
        during = self

        class Counted(Task):
            def advance(self, n: int) -> None:
                if during.left > 0 and (left := during.left - n) <= 0:
                    during.left = left
                    during.call()
                during.left -= n

        yield Counted()


def test_the_first_steps_give_what_a_training_gives_that_ends_there(
    tmp_path: Path, one_epoch: np.ndarray
) -> None:
    run = tmp_path / "run"
    hydra_pipe.record(constant(3), run, test_every="epoch")
    assert hydra_pipe.reduce(run, up_to_step=STEPS, method="hydra")
    assert not hydra_pipe.reduce(run, up_to_step=STEPS, method="hydra")
    assert relative_error(relevance(run, "hydra-upto-4"), one_epoch) < 1e-6
    hydra_pipe.reduce(run, method="hydra")
    assert relative_error(relevance(run), one_epoch) > 0.1
    hydra_pipe.reduce(run, up_to_step=3 * STEPS, by="mean", method="hydra")
    assert (
        relative_error(relevance(run, "hydra-upto-12-mean")[:, 0], relevance(run).mean(axis=1))
        < 1e-5
    )
    assert hydra_pipe.verify(run) == []


def test_readers_beside_a_recording_see_the_steps_that_are_safe(
    tmp_path: Path, one_epoch: np.ndarray
) -> None:
    run, seen = tmp_path / "run", []

    def look() -> None:
        info = hydra_pipe.open_run(run).info()["recording"]
        seen.append((info["rows"], info["steps"], info["test_checkpoints"]))
        hydra_pipe.reduce(run, up_to_step=STEPS, method="hydra")
        hydra_pipe.export(run, method="hydra-upto-4")
        seen.append(relevance(run, "hydra-upto-4"))
        with pytest.raises(
            UsageError, match=r"--up-to-step 8: test gradients were taken after 4 steps: choose one"
        ):
            hydra_pipe.reduce(run, up_to_step=2 * STEPS, method="hydra")
        assert [fault.kind for fault in hydra_pipe.verify(run)] == ["unfinished"]

    # the test gradients of the first epoch, and then half of the second one
    hydra_pipe.record(constant(3), run, test_every="epoch", progress=During(26 + 7 + 13, look))
    assert seen[0] == (26, STEPS, [STEPS])
    assert relative_error(seen[1], one_epoch) < 1e-6
    assert not hydra_pipe.reduce(run, up_to_step=STEPS, method="hydra")
    assert np.array_equal(relevance(run, "hydra-upto-4"), seen[1])
    visits = duckdb.sql(
        f"select visits from '{run}/rankings/method=hydra-upto-4/samples.parquet'"
    ).fetchall()
    assert visits == [(1,)] * 26
    assert hydra_pipe.verify(run) == []
    shutil.rmtree(run / "relevance.zarr")
    hydra_pipe.reduce(run, up_to_step=STEPS, overwrite=True, method="hydra")
    assert np.array_equal(relevance(run, "hydra-upto-4"), seen[1])


def test_what_was_computed_from_steps_that_are_recorded_anew_is_forgotten(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"test_every": "2", "checkpoint_every": "4"}
    record_and_die(7, lambda: constant(3), run, **options)
    for step in (4, 6):
        hydra_pipe.reduce(run, up_to_step=step, method="hydra")
        hydra_pipe.export(run, method=f"hydra-upto-{step}")
    hydra_pipe.record(constant(3), run, **options)
    assert list(RunDirectory.open(run).stages) == [
        RECORD,
        REDUCE.of("hydra-upto-4"),
        EXPORT.of("hydra-upto-4"),
    ]
    assert hydra_pipe.verify(run) == []
    hydra_pipe.reduce(run, up_to_step=6, method="hydra")


def test_of_a_recording_that_was_killed_before_anything_was_safe_nothing_is_read(
    tmp_path: Path,
) -> None:
    record_and_die(2, lambda: constant(3), tmp_path / "run", test_every="epoch")
    with pytest.raises(
        RunError, match="no step is committed yet: wait for the first checkpoint or test gradients"
    ):
        hydra_pipe.reduce(tmp_path / "run", up_to_step=STEPS, method="hydra")


def test_what_cannot_be_of_the_first_steps_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UsageError, match="--test-every 0: give epoch, or a number of steps"):
        hydra_pipe.record(constant(3), run, test_every="0")
    hydra_pipe.record(constant(3), run, test_every="5")
    with pytest.raises(
        UsageError, match=r"--up-to-step 4: test gradients were taken after 5, 10, 12 steps"
    ):
        hydra_pipe.reduce(run, up_to_step=4, method="hydra")
    with pytest.raises(UsageError, match="--up-to-step and --keep-hypergradients: choose one"):
        hydra_pipe.reduce(run, up_to_step=5, keep_hypergradients=True, method="hydra")
    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    hydra_pipe.reduce(run, up_to_step=12, method="hydra")
    assert relative_error(relevance(run, "hydra-upto-12"), relevance(run)) < 1e-6
    hydra_pipe.prune(run)
    with pytest.raises(
        RunError,
        match=(
            "its rows were pruned, and its hypergradients are kept for all steps: leave out "
            "--up-to-step"
        ),
    ):
        hydra_pipe.reduce(run, up_to_step=5, method="hydra")


@pytest.mark.parametrize(
    "damage",
    [
        {"n_steps": 10**15},
        {"n_steps": -1},
        {"part_rows": [10**15]},
        {"part_rows": [26, 26]},
        {"part_rows": 26},
        {"tests": None},
        {"tests": ["4"]},
        {"n_tests": 10**15},
        {"n_tests": None},
    ],
    ids=str,
)
def test_damaged_counts_of_what_is_safe_are_told(tmp_path: Path, damage: dict[str, object]) -> None:
    run = tmp_path / "run"
    record_and_die(7, lambda: constant(3), run, test_every="epoch")
    directory = RunDirectory.open(run)
    directory.stages[RECORD].facts["committed"] |= damage
    directory.save(RECORD)
    # there are no more, and these are as they were
    if "n_steps" in damage and damage["n_steps"] == 10**15:
        hydra_pipe.reduce(run, up_to_step=STEPS, method="hydra")
        return
    with pytest.raises(HydraError) as told:
        hydra_pipe.reduce(run, up_to_step=STEPS, method="hydra")
    assert isinstance(told.value, StoreError)
