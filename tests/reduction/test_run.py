"""A reduction as a user asks for it: both orders of work, some test samples, means of them, and
going on after an interruption.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pytest
from support.compare import relative_error

import hydra_pipe
from hydra_pipe.errors import RunError, StoreError, UsageError
from hydra_pipe.plan.records import Answered, ReductionInput
from hydra_pipe.plan.sums import SumInput, SumPlan, plan_sums
from hydra_pipe.reduction.solvers import sums
from hydra_pipe.reduction.solvers.common import CommonSolver
from hydra_pipe.store.data import relevance as relevance_module
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD, REDUCE

Recorded = Callable[..., Path]
TWOS = ((0, 2), (2, 4), (4, 6), (6, 7))


@pytest.fixture
def run(tmp_path: Path, recorded: Recorded) -> Path:
    """26 samples, 7 test samples; convolutions, a Linear that is factored, and norms."""
    return shutil.copytree(recorded(encoding="exact", dtype="float32"), tmp_path / "run")


def relevance(run: Path, method: str = "hydra") -> np.ndarray:
    return np.asarray(hydra_pipe.open_run(run).relevance(method))


@pytest.fixture
def whole(tmp_path: Path, run: Path) -> np.ndarray:
    """The relevance for all test samples, of another copy."""
    other = shutil.copytree(run, tmp_path / "whole")
    hydra_pipe.reduce(other, method="hydra")
    return relevance(other)


def planned(patch: pytest.MonkeyPatch, **changes: object) -> None:
    """Let the plan be what it is, but for `changes`."""

    def changed(
        given: SumInput, chunks: tuple[int, int] | None, answered: Answered | None = None
    ) -> SumPlan:
        plan = dataclasses.replace(plan_sums(given, chunks), **changes)
        done = answered.done if answered else 0
        left = "test_blocks" if plan.order == "score first" else "sample_blocks"
        return dataclasses.replace(
            plan, **{left: tuple(block for block in getattr(plan, left) if block[0] >= done)}
        )

    patch.setattr("hydra_pipe.reduction.solvers.sums.plan_sums", changed)


def eights(patch: pytest.MonkeyPatch) -> tuple[tuple[int, int], ...]:
    """Chunks of eight samples, so that there are several."""
    patch.setattr(relevance_module, "CHUNK_SAMPLES", 8)
    patch.setattr(sums, "SAMPLE_MULTIPLE", 8)
    return ((0, 8), (8, 16), (16, 24), (24, 26))


@pytest.mark.parametrize("order", ["score first", "fold first"])
def test_orders_and_passes_give_the_same_relevance(
    run: Path, whole: np.ndarray, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = (
        {"test_blocks": TWOS}
        if order == "score first"
        else {"sample_blocks": eights(monkeypatch), "test_blocks": TWOS}
    )
    planned(monkeypatch, order=order, **blocks)
    hydra_pipe.reduce(run, method="hydra")
    assert relative_error(relevance(run), whole) < 1e-6
    assert hydra_pipe.verify(run) == []


@pytest.mark.parametrize("order", ["score first", "fold first"])
@pytest.mark.parametrize(
    ("selection", "ids"), [("0-6", [*range(7)]), ("3", [3]), ("5,0-1,6", [0, 1, 5, 6])]
)
def test_some_test_samples_are_those_columns(
    run: Path,
    whole: np.ndarray,
    order: str,
    selection: str,
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned(monkeypatch, order=order)
    hydra_pipe.reduce(run, tests=selection, method="hydra")
    found = hydra_pipe.open_run(run).relevance("hydra")
    assert relative_error(np.asarray(found), whole[:, ids]) < 1e-6
    assert found.test.values.tolist() == ids
    assert (
        found.test_label.values.tolist()
        == hydra_pipe.open_run(run).gradients.labels("test")[ids].tolist()
    )
    assert hydra_pipe.verify(run) == []
    hydra_pipe.export(run, top=3, full=True, method="hydra")
    rankings = run / "rankings" / "method=hydra"
    for tables in ("part-*.parquet", "matrix/part-*.parquet"):
        query = f"select distinct test_id from '{rankings / tables}' order by 1"
        assert [row[0] for row in duckdb.sql(query).fetchall()] == ids
    best = duckdb.sql(
        f"select train_id from '{rankings}/part-*.parquet' where test_id = {ids[-1]} and rank = "
        "1 and side = 'helpful'"
    )
    assert best.fetchall() == [(int(whole[:, ids[-1]].argmax()),)]


@pytest.mark.parametrize("order", ["score first", "fold first"])
@pytest.mark.parametrize("selection", [None, "1-4,6"])
def test_means_are_means_of_columns(
    run: Path, whole: np.ndarray, order: str, selection: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch, order=order)
    ids = [*range(7)] if selection is None else [1, 2, 3, 4, 6]
    labels = hydra_pipe.open_run(run).gradients.labels("test")[ids]
    hydra_pipe.reduce(run, by="label", tests=selection, method="hydra")
    hydra_pipe.reduce(run, by="mean", tests=selection, method="hydra")
    by_label = hydra_pipe.open_run(run).relevance("hydra-by-label")
    assert by_label.test_group_label.values.tolist() == sorted(set(labels))
    truth = np.stack(
        [whole[:, ids][:, labels == label].mean(axis=1) for label in sorted(set(labels))], axis=1
    )
    assert relative_error(np.asarray(by_label), truth) < 1e-5
    assert relative_error(relevance(run, "hydra-mean")[:, 0], whole[:, ids].mean(axis=1)) < 1e-5
    assert hydra_pipe.verify(run) == []
    hydra_pipe.export(run, method="hydra-by-label", top=3)
    query = (
        "select distinct test_id, test_label from "
        f"'{run}/rankings/method=hydra-by-label/part-*.parquet' order by 1"
    )
    assert duckdb.sql(query).fetchall() == list(enumerate(sorted(set(labels))))


def test_results_of_all_some_and_means_stand_side_by_side(run: Path) -> None:
    assert hydra_pipe.reduce(run, method="hydra")
    assert hydra_pipe.reduce(run, by="mean", method="hydra")
    assert not hydra_pipe.reduce(run, method="hydra")
    assert hydra_pipe.open_run(run).methods == ["hydra", "hydra-mean"]
    with pytest.raises(RunError, match="reduce hydra was run with tests=None, now tests='0-3'"):
        hydra_pipe.reduce(run, tests="0-3", method="hydra")
    assert hydra_pipe.reduce(run, tests="0-3", overwrite=True, method="hydra")
    assert not hydra_pipe.reduce(run, tests="0,1,2,3", method="hydra")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tests": "7"}, r"--tests 7: 7 is not within the 7 test samples, which are 0-6"),
        ({"tests": "a"}, r"--tests a is not a selection"),
        ({"by": "colour"}, r"--by colour is unknown: choose label, or --mean"),
    ],
)
def test_what_cannot_be_is_wrong_usage(run: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hydra_pipe.reduce(run, **options)


def test_means_by_label_need_labels(run: Path) -> None:
    shutil.rmtree(run / "gradients.zarr" / "labels")
    with pytest.raises(StoreError, match="labels/test is missing"):
        hydra_pipe.reduce(run, by="label", method="hydra")
    directory = RunDirectory.open(run)
    directory.stages[RECORD].facts["labels"] = {}
    directory.save(RECORD)
    with pytest.raises(
        UsageError, match=r"has no labels of test samples: take the mean of all with --mean"
    ):
        hydra_pipe.reduce(run, by="label", method="hydra")


class InterruptedHereError(Exception):
    pass


def interrupted(run: Path, patch: pytest.MonkeyPatch, after: int) -> None:
    """Reduce, and fail when `after` passes are done."""
    original = sums.graphs
    with pytest.MonkeyPatch.context() as stop:

        def some(*arguments: object):
            for number, found in enumerate(original(*arguments)):
                if number == after:
                    raise InterruptedHereError
                yield found

        stop.setattr("hydra_pipe.reduction.solvers.sums.graphs", some)
        with pytest.raises(InterruptedHereError):
            hydra_pipe.reduce(run, method="hydra")


@pytest.mark.parametrize("order", ["score first", "fold first"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_the_same_call_goes_on_after_the_passes_that_are_done(
    run: Path, whole: np.ndarray, order: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = (
        {"test_blocks": TWOS} if order == "score first" else {"sample_blocks": eights(monkeypatch)}
    )
    planned(monkeypatch, order=order, **blocks)
    interrupted(run, monkeypatch, after)
    assert RunDirectory.open(run).stages[REDUCE.of("hydra")].state == "failed"
    chunks = run / "relevance.zarr/hydra/c"
    written = (
        {file: file.stat().st_mtime_ns for file in chunks.rglob("*") if file.is_file()}
        if after
        else {}
    )
    # score first: test samples in twos, in chunks of all samples (of eight where there are such);
    # fold first: a chunk a pass
    assert len(written) == after
    assert hydra_pipe.reduce(run, method="hydra")
    assert relative_error(relevance(run), whole) < 1e-6
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert hydra_pipe.verify(run) == []


def test_other_settings_do_not_go_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, order="score first", test_blocks=TWOS)
    interrupted(run, monkeypatch, 2)
    with pytest.raises(RunError, match="reduce hydra was run with tests=None, now tests='0-1'"):
        hydra_pipe.reduce(run, tests="0-1", method="hydra")


def test_what_is_no_longer_there_is_begun_anew(
    run: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch, order="score first", test_blocks=TWOS)
    interrupted(run, monkeypatch, 2)
    shutil.rmtree(run / "relevance.zarr")
    hydra_pipe.reduce(run, method="hydra")
    assert relative_error(relevance(run), whole) < 1e-6


def test_what_was_begun_from_rows_is_begun_anew_from_what_was_kept_meanwhile(
    run: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        planned(patch, order="score first", test_blocks=TWOS)
        interrupted(run, patch, 2)
    hydra_pipe.reduce(run, by="mean", keep_hypergradients=True, method="hydra")
    assert hydra_pipe.reduce(run, method="hydra")
    assert (
        RunDirectory.open(run).stages[REDUCE.of("hydra")].facts["plan"]["order"]
        == "from hypergradients"
    )
    assert relative_error(relevance(run), whole) < 1e-6


@pytest.mark.parametrize(("more", "taken"), [(2**20, 0), (2**29, 2**29)])
def test_what_goes_on_counts_with_the_memory_that_the_first_process_took(
    run: Path, more: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process takes a little more or less each time: at the edge of a budget the work must not be
    divided otherwise for that.
    """
    planned(monkeypatch, order="score first", test_blocks=TWOS)
    bases: list[int] = []
    plan = CommonSolver._planned

    def noted(*arguments: object) -> tuple[ReductionInput, SumPlan]:
        given, found = plan(*arguments)
        bases.append(given.base_bytes)
        return given, found

    monkeypatch.setattr(CommonSolver, "_planned", noted)
    monkeypatch.setattr("hydra_pipe.reduction.solvers.common.base_bytes", lambda resident: 2**28)
    interrupted(run, monkeypatch, 2)
    monkeypatch.setattr(
        "hydra_pipe.reduction.solvers.common.base_bytes", lambda resident: 2**28 + more
    )
    hydra_pipe.reduce(run, method="hydra")
    assert bases == [2**28, 2**28 + taken, 2**28 + taken]
