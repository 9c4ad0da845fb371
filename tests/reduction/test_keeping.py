"""Hypergradients that are kept: what they answer, and that the rows may go."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.compare import relative_error

import hydra_pipe
from hydra_pipe.errors import HydraError, RunError, StoreError
from hydra_pipe.plan import chunking
from hydra_pipe.plan.layout import Block, Layout, factored_part
from hydra_pipe.plan.records import Answered
from hydra_pipe.plan.sums import SumInput, SumPlan
from hydra_pipe.reduction.solvers import sums as sums_module
from hydra_pipe.store.run.locks import one_writer
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import KEEP, REDUCE

Recorded = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, recorded: Recorded) -> Path:
    return shutil.copytree(recorded(encoding="exact", dtype="float32"), tmp_path / "run")


@pytest.fixture
def whole(tmp_path: Path, run: Path) -> np.ndarray:
    other = shutil.copytree(run, tmp_path / "whole")
    hydra_pipe.reduce(other, method="hydra")
    return relevance(other)


def relevance(run: Path, method: str = "hydra") -> np.ndarray:
    return np.asarray(hydra_pipe.open_run(run).relevance(method))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def order_of(run: Path, method: str = "hydra") -> str:
    return str(RunDirectory.open(run).stages[REDUCE.of(method)].facts["plan"]["order"])


def test_kept_hypergradients_answer_without_the_rows(run: Path, whole: np.ndarray) -> None:
    assert hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    assert relative_error(relevance(run), whole) < 1e-6
    assert not hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    assert hydra_pipe.verify(run) == []
    assert hydra_pipe.prune(run) > 0
    assert hydra_pipe.prune(run) == 0
    for name in ("gradient", "scale", "curvature"):
        assert not (run / "gradients.zarr" / name / "c").exists()
    assert hydra_pipe.verify(run) == []

    hydra_pipe.reduce(run, tests="2-4", overwrite=True, method="hydra")
    assert order_of(run) == "from hypergradients"
    assert relative_error(relevance(run), whole[:, 2:5]) < 1e-6
    hydra_pipe.reduce(run, by="mean", method="hydra")
    assert relative_error(relevance(run, "hydra-mean")[:, 0], whole.mean(axis=1)) < 1e-5
    assert hydra_pipe.verify(run) == []
    assert hydra_pipe.export(run, top=2, method="hydra")
    assert hydra_pipe.open_run(run).info()["recording"]["rows"] > 0


def test_more_than_one_file_and_chunk_are_kept_whole(
    run: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows in shards of eight, sums in files of four."""
    from support.pipelines import conv_pipeline

    monkeypatch.setattr(chunking, "MAX_SHARD_ROWS", 8)
    monkeypatch.setattr("hydra_pipe.store.data.hypergradients.MOST_FILE_ROWS", 4)
    hydra_pipe.record(conv_pipeline(), tmp_path / "small", encoding="exact", dtype="float32")
    hydra_pipe.reduce(tmp_path / "small", keep_hypergradients=True, method="hydra")
    assert len(list((tmp_path / "small/hypergradients/hydra.zarr/folded/c").iterdir())) == 7
    hydra_pipe.prune(tmp_path / "small")
    hydra_pipe.reduce(tmp_path / "small", overwrite=True, method="hydra")
    assert relative_error(relevance(tmp_path / "small"), whole) < 1e-5


def test_what_is_kept_later_is_the_same(run: Path, whole: np.ndarray) -> None:
    hydra_pipe.reduce(run, method="hydra")
    assert hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    hydra_pipe.reduce(run, overwrite=True, method="hydra")
    assert order_of(run) == "from hypergradients"
    assert relative_error(relevance(run), whole) < 1e-6


def test_rows_are_only_deleted_where_hypergradients_are_kept(run: Path) -> None:
    hydra_pipe.reduce(run, method="hydra")
    with pytest.raises(
        RunError,
        match=r"keeps no hypergradients: run hydra-pipe reduce .* --keep-hypergradients first",
    ):
        hydra_pipe.prune(run)
    assert hydra_pipe.verify(run) == []


@pytest.mark.parametrize(
    "name",
    ["folded/c/0/0", "factored/gradient/c/0/0", "factored/scale/c/0/0", "factored/sample/c/0"],
)
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_rows_are_not_deleted_where_what_is_kept_is_damaged(
    run: Path, name: str, damage: Callable[[Path], None]
) -> None:
    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    damage(run / "hypergradients/hydra.zarr" / name)
    assert [fault.where for fault in hydra_pipe.verify(run)] == [
        f"hypergradients/hydra.zarr/{name}"
    ]
    with pytest.raises(StoreError, match="nothing was deleted"):
        hydra_pipe.prune(run)
    assert (run / "gradients.zarr/gradient/c/0/0").exists()


def test_a_pruned_run_keeps_no_hypergradients_again(run: Path) -> None:
    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    hydra_pipe.prune(run)
    with pytest.raises(
        HydraError, match="its gradients were pruned, and its hypergradients are kept"
    ):
        hydra_pipe.reduce(run, keep_hypergradients=True, overwrite=True, method="hydra")


def test_a_new_recording_drops_what_was_kept(run: Path) -> None:
    from support.pipelines import conv_pipeline

    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    hydra_pipe.record(conv_pipeline(), run, encoding="exact", dtype="float32", overwrite=True)
    assert not (run / "hypergradients/hydra.zarr").exists()
    assert KEEP.of("hydra") not in RunDirectory.open(run).stages


def test_an_interrupted_keeping_goes_on_and_is_not_taken_for_complete(
    run: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hydra_pipe.reduction.solvers.sums.write_folded", fail)
        with pytest.raises(OSError, match="No space left"):
            hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    # without keeping, what is there of it is not used
    hydra_pipe.reduce(run, method="hydra")
    assert order_of(run) != "from hypergradients"
    assert hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    hydra_pipe.prune(run)
    hydra_pipe.reduce(run, overwrite=True, method="hydra")
    assert relative_error(relevance(run), whole) < 1e-6


def test_what_is_kept_anew_is_not_gone_on_with(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted keeping, then another that removes what the first had kept, then the first
    again.
    """
    monkeypatch.setattr("hydra_pipe.store.data.hypergradients.MOST_FILE_ROWS", 8)
    monkeypatch.setattr("hydra_pipe.reduction.solvers.sums.SAMPLE_MULTIPLE", 8)
    monkeypatch.setattr("hydra_pipe.store.data.relevance.CHUNK_SAMPLES", 8)
    plan_sums = sums_module.plan_sums

    def in_eights(
        given: SumInput, chunks: tuple[int, int] | None, answered: Answered | None = None
    ) -> SumPlan:
        first = range(answered.done if answered else 0, 26, 8)
        return replace(
            plan_sums(given, chunks, answered),
            sample_blocks=tuple((a, min(a + 8, 26)) for a in first),
        )

    monkeypatch.setattr(sums_module, "plan_sums", in_eights)
    written = sums_module.write_folded

    def fail_after(last: int) -> Callable[..., None]:
        def write(path: Path, first: int, sums: np.ndarray) -> None:
            if first > last:
                raise OSError(28, "No space left on device")
            written(path, first, sums)

        return write

    for last, by in ((8, None), (-1, "mean")):
        monkeypatch.setattr(sums_module, "write_folded", fail_after(last))
        with pytest.raises(OSError, match="No space left"):
            hydra_pipe.reduce(run, by=by, keep_hypergradients=True, method="hydra")
    monkeypatch.setattr(sums_module, "write_folded", written)
    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    assert hydra_pipe.prune(run) > 0


def test_rows_are_not_deleted_while_hypergradients_are_kept_anew(run: Path) -> None:
    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    with (
        one_writer(run, KEEP.of("hydra")),
        pytest.raises(RunError, match="is being written by this very process"),
    ):
        hydra_pipe.prune(run)


def test_factored_columns_are_put_side_by_side() -> None:
    layout = Layout(
        (
            Block("a", (3,), 0, "dense", (0, 3)),
            Block("w", (2, 4), 0, "factored", (7, 9), (3, 7)),
            Block("b", (2,), 0, "factored", (7, 9)),
            Block("c", (1,), 0, "sketch", (9, 10)),
            Block("v", (1, 2), 0, "factored", (10, 11), (11, 13)),
        ),
        13,
        5,
    )
    part, columns, blocks = factored_part(layout)
    assert (columns, blocks) == ([3, 4, 5, 6, 7, 8, 10, 11, 12], [1, 2, 4])
    assert [(b.name, b.columns, b.inputs) for b in part.blocks] == [
        ("w", (4, 6), (0, 4)),
        ("b", (4, 6), None),
        ("v", (6, 7), (7, 9)),
    ]
    assert part.n_features == 9
