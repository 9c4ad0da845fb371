"""The matrix of hypergradients that a sweep keeps: it answers as the sweep does, without the rows;
nothing else is taken for it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from made_up import (
    InterruptedHereError,
    adamw,
    by_loop,
    in_blocks,
    interrupted_after,
    made_up,
    relevance,
)
from support.compare import relative_error
from support.pipelines import conv_pipeline
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app
from hydra_pipe.errors import BudgetError, RunError, StoreError
from hydra_pipe.plan import chunking
from hydra_pipe.plan import hypergradient_matrix as matrix_plan
from hydra_pipe.reduction.solvers import hypergradient_matrix, sweep
from hydra_pipe.store.data import save_interval
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import KEEP, RECORD, REDUCE
from hydra_pipe.store.zarr.arrays import Array

KEPT = "hypergradients/hydra-fisher.zarr"


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that lie across files of rows; several files of the matrix, and several shares of the
    samples.
    """
    monkeypatch.setattr(chunking, "MAX_SHARD_ROWS", 12)
    monkeypatch.setattr(matrix_plan, "MOST_SAMPLES", 8)
    monkeypatch.setattr("hydra_pipe.store.data.relevance.CHUNK_SAMPLES", 8)
    for module in ("plan.from_matrix", "reduction.solvers.from_matrix"):
        monkeypatch.setattr(f"hydra_pipe.{module}.SAMPLE_MULTIPLE", 8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_up(tmp_path / "run", 2)


def go(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Let the matrix be filled in that order, whichever is cheaper."""
    way = {"backward": matrix_plan.of_features, "forward": matrix_plan.of_samples}[order]
    for name in ("of_features", "of_samples"):
        monkeypatch.setattr(matrix_plan, name, way)


def keep(run: Path, **options: object) -> bool:
    return hydra_pipe.reduce(run, method="hydra-fisher", keep_hypergradients=True, **options)


def orders(run: Path) -> dict[str, str]:
    stages = RunDirectory.open(run).stages
    return {
        str(name): stage.facts["plan"]["order"]
        for name, stage in stages.items()
        if "plan" in stage.facts
    }


@pytest.mark.parametrize(
    ("pipeline", "options", "order"),
    [
        (conv_pipeline, {"encoding": "exact", "dtype": "float32"}, "forward"),
        (conv_pipeline, {"encoding": "projected", "dim": 60}, "backward"),
        (conv_pipeline, {"encoding": "projected", "dim": 60, "dtype": "int8"}, "forward"),
        (adamw, {"encoding": "exact", "dtype": "float32"}, "backward"),
        (adamw, {"encoding": "projected", "dim": 60}, "forward"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_the_matrix_answers_as_the_sweep_without_the_rows(
    tmp_path: Path,
    pipeline: Callable[..., hydra_pipe.Pipeline],
    options: dict[str, object],
    order: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    go(monkeypatch, order)
    hydra_pipe.record(pipeline(epochs=1), run, **options)
    hydra_pipe.reduce(run, method="hydra-fisher")
    swept, loop = relevance(run), by_loop(run)
    assert keep(run)
    assert not keep(run)
    assert orders(run)["keep hydra-fisher"] == order
    # it was there, and need not be computed again
    assert orders(run)["reduce hydra-fisher"] == "backward"
    assert hydra_pipe.verify(run) == []
    assert hydra_pipe.prune(run) > 0
    assert hydra_pipe.reduce(run, method="hydra-fisher", overwrite=True)
    assert orders(run)["reduce hydra-fisher"] == "from the matrix"
    assert relative_error(relevance(run), swept) < 2e-6
    assert relative_error(relevance(run), loop) < 1e-4
    hydra_pipe.reduce(run, method="hydra-fisher", by="mean", tests="1-3,6")
    assert (
        relative_error(
            relevance(run, "hydra-fisher-mean")[:, 0], swept[:, [1, 2, 3, 6]].mean(axis=1)
        )
        < 2e-6
    )
    assert hydra_pipe.verify(run) == []
    stages = RunDirectory.open(run).stages
    assert (
        stages[REDUCE.of("hydra-fisher-mean")].facts["curvature_left"]
        == stages[KEEP.of("hydra-fisher")].facts["curvature_left"]
    )
    hydra_pipe.export(run, method="hydra-fisher", top=2)


@pytest.mark.parametrize("order", ["backward", "forward"])
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_of_several_processes_groups_and_labels(
    tmp_path: Path, n_ranks: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(monkeypatch, order)
    run = made_up(tmp_path / "run", n_ranks)
    assert keep(run, by="label")
    expected = by_loop(run)
    means = np.stack([expected[:, label::3].mean(axis=1) for label in range(3)], axis=1)
    assert relative_error(relevance(run, "hydra-fisher-by-label"), means) < 3e-4
    hydra_pipe.reduce(run, method="hydra-fisher", tests="2-4,8")
    assert relative_error(relevance(run), expected[:, [2, 3, 4, 8]]) < 3e-4
    assert list(orders(run).values()) == [order, "from the matrix", "from the matrix"]


def test_any_zarr_reader_answers_from_the_matrix_by_its_directory_of_features(run: Path) -> None:
    """As docs/format.md has it: the gradient of each block, flattened, at the features that the
    directory says.
    """
    keep(run)
    group = zarr.open_group(run / KEPT, mode="r")
    assert (group.attrs["hydra_pipe"], group.attrs["method"]) == (
        "hypergradient matrix",
        "hydra-fisher",
    )
    tests = zarr.open_group(run / "gradients.zarr/test/0000000007", mode="r")
    stored, scale = tests["gradient"][:].astype(np.float64), tests["scale"][:]
    outputs, inputs = stored[:, 7:10], stored[:, 10:15]
    gradients = {
        "c": stored[:, :7] * scale[:, :1],
        "w": np.einsum("to,ti->toi", outputs, inputs).reshape(len(stored), -1) * scale[:, 1:2],
        "b": outputs * scale[:, 2:3],
        "d": stored[:, 15:] * scale[:, 3:],
    }
    flat = np.concatenate(
        [gradients[name] for name, _, _ in group.attrs["hydra_pipe_features"]], axis=1
    )
    assert [last - first for _, first, last in group.attrs["hydra_pipe_features"]] == [7, 15, 3, 4]
    assert group["swept"].dtype == np.float32
    assert group["swept"].metadata.dimension_names == ("sample", "feature")
    assert relative_error(group["swept"][:] @ flat.T, by_loop(run)) < 3e-4


@pytest.mark.parametrize(
    ("order", "width", "workers", "scheduler"),
    [
        ("backward", 3, 2, "threads"),
        ("backward", 10, 2, "synchronous"),
        ("backward", 29, 1, "threads"),
        ("forward", 3, 2, "threads"),
        ("forward", 7, 2, "synchronous"),
        ("forward", 20, 1, "threads"),
    ],
)
def test_any_division_of_the_features_samples_and_columns_gives_the_same(
    run: Path, order: str, width: int, workers: int, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(monkeypatch, order)
    in_blocks(monkeypatch, width, workers)
    keep(run, scheduler=scheduler)
    assert relative_error(relevance(run), by_loop(run)) < 3e-4
    assert hydra_pipe.verify(run) == []


def contents(run: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in (run / KEPT).rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("order", ["backward", "forward"])
@pytest.mark.parametrize("after", [3, 7, 20])
def test_keeping_goes_on_in_its_middle_to_the_same_bytes(
    run: Path, after: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(monkeypatch, order)
    other = shutil.copytree(run, run.with_name("other"))
    in_blocks(monkeypatch, 8, 1)
    monkeypatch.setattr(save_interval, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(save_interval, "TIMES_ITS_COST", 0.0)
    keep(other)
    with interrupted_after(after):
        keep(run)
    assert KEEP.of("hydra-fisher") in {
        name for name, stage in RunDirectory.open(run).stages.items() if stage.state == "failed"
    }
    with pytest.raises(
        RunError,
        match=(
            r"keep hydra-fisher is not finished .*run hydra-pipe reduce .* --keep-hypergradients "
            r"first"
        ),
    ):
        hydra_pipe.prune(run)
    real, again = sweep._step, []
    monkeypatch.setattr(
        sweep, "_step", lambda *arguments: (again.append(arguments), real(*arguments))
    )
    keep(run)
    n_blocks = {"backward": 4, "forward": 3}[order]
    assert len(again) == 7 * n_blocks - after
    assert contents(run) == contents(other)
    assert np.array_equal(relevance(run), relevance(other))
    assert hydra_pipe.verify(run) == []


@pytest.mark.parametrize(
    ("first", "then"), [("backward", "backward"), ("forward", "forward"), ("forward", "backward")]
)
def test_what_was_begun_in_another_way_is_begun_anew(
    run: Path, first: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise InterruptedHereError

    with pytest.MonkeyPatch.context() as patch:
        go(patch, first)
        in_blocks(patch, 8, 1)
        solver = hypergradient_matrix.HypergradientMatrix
        marked = solver.mark
        patch.setattr(
            solver,
            "mark",
            lambda solver, answered: stop() if answered.done == 16 else marked(solver, answered),
        )
        with pytest.raises(InterruptedHereError):
            keep(run)
    go(monkeypatch, then)
    in_blocks(monkeypatch, 10, 1)
    keep(run)
    assert orders(run)["keep hydra-fisher"] == then
    assert relative_error(relevance(run), by_loop(run)) < 3e-4
    assert hydra_pipe.verify(run) == []


def test_what_the_disk_or_the_budget_has_no_room_for_is_refused_before_anything_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "run.json").read_bytes()
    with pytest.raises(
        BudgetError, match=r"a sweep of one column over 29 features needs .* raise --memory to"
    ):
        keep(run, memory="100MiB")
    monkeypatch.setattr(hypergradient_matrix, "free_bytes", lambda _: 2000)
    for attempt in (
        keep,
        lambda run: hydra_pipe.plan_reduction(run, method="hydra-fisher", keep_hypergradients=True),
    ):
        with pytest.raises(
            BudgetError,
            match=r"keeping 20 samples x 29 features x 4 bytes = 2.27 KiB, and .* needs .* on "
            r"the disk, 1.95 KiB are free at .*: "
            r"make room, leave out --keep-hypergradients, or record with --encoding projected "
            r"and a lower --dim",
        ):
            attempt(run)
    assert (run / "run.json").read_bytes() == before
    assert not (run / "hypergradients").exists()


def test_a_dry_run_says_what_keeping_costs_and_what_answering_does(run: Path) -> None:
    before = (run / "run.json").read_bytes()
    result = CliRunner().invoke(
        app,
        [
            "reduce",
            str(run),
            "--method",
            "hydra-fisher",
            "--keep-hypergradients",
            "--dry-run",
            "--mean",
        ],
    )
    assert result.exit_code == 0, result.output
    first, then = result.stdout.split("\n\n")
    for words in (
        "20 samples x 29 features",
        "forward, with 20 samples as columns",
        "written",
        "2.27 KiB",
        "peak memory",
        "time",
    ):
        assert words in first
    assert "from the matrix" in then
    assert "20 x 11, in 1 groups" in then
    assert (run / "run.json").read_bytes() == before
    assert not (run / "hypergradients").exists()


def change(file: Path, how: Callable[[dict], object]) -> None:
    data = json.loads(file.read_bytes())
    how(data)
    file.write_bytes(json.dumps(data).encode())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: a.update(run_id="another"), "belongs to another recording"),
        (
            lambda a: a.update(method="hydra"),
            "has 'hypergradient matrix' of method 'hydra', not hypergradient matrix of "
            "hydra-fisher",
        ),
        (
            lambda a: a.update(hydra_pipe="hypergradients"),
            "has 'hypergradients' of method 'hydra-fisher'",
        ),
        (lambda a: a["hydra_pipe_features"].reverse(), "has other features than"),
        (lambda a: a.pop("hydra_pipe_features"), "has other features than"),
    ],
)
def test_only_the_matrix_of_this_recording_and_method_answers(
    run: Path, damage: Callable[[dict], object], message: str
) -> None:
    keep(run)
    change(run / KEPT / "zarr.json", lambda data: damage(data["attributes"]))
    with pytest.raises(StoreError, match=rf"hydra-fisher.zarr.* {message}.*keep them again with"):
        hydra_pipe.reduce(run, method="hydra-fisher", overwrite=True)
    assert [fault.where for fault in hydra_pipe.verify(run)] == [f"{KEPT}/zarr.json"]


@pytest.mark.parametrize("shape", [(21, 29), (20, 30), (2**40, 29)])
def test_a_matrix_of_another_shape_is_refused(run: Path, shape: tuple[int, int]) -> None:
    keep(run)
    change(run / KEPT / "swept/zarr.json", lambda data: data.update(shape=list(shape)))
    with pytest.raises(
        StoreError, match=r"swept has .*keep them again|swept has .*record the run again"
    ):
        hydra_pipe.reduce(run, method="hydra-fisher", overwrite=True)


@pytest.mark.parametrize("value", [-1, 20])
@pytest.mark.parametrize("order", ["backward", "forward"])
def test_samples_that_are_not_there_are_told(
    run: Path, value: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = Array.open(run / "gradients.zarr/rank/0/sample")
    values = array.read(slice(0, array.file_rows)).copy()
    values[3] = value
    array.write_file((0,), values)
    go(monkeypatch, order)
    for attempt in (keep, lambda run: hydra_pipe.reduce(run, method="hydra-fisher")):
        with pytest.raises(
            StoreError, match=r"samples of .*gradients.zarr are -?\d+ to \d+, not within 0 to 19"
        ):
            attempt(run)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_matrix_is_found_and_kept_again(run: Path) -> None:
    keep(run)
    whole = relevance(run)
    flip(run / KEPT / "swept/c/1/0")
    (fault,) = hydra_pipe.verify(run)
    assert fault.where == f"{KEPT}/swept/c/1/0"
    assert "run --keep-hypergradients --overwrite" in fault.what
    with pytest.raises(StoreError, match="nothing was deleted"):
        hydra_pipe.prune(run)
    assert hydra_pipe.verify(run, repair=True) == []
    assert KEEP.of("hydra-fisher") not in RunDirectory.open(run).stages
    assert keep(run)
    assert np.array_equal(relevance(run), whole)
    assert hydra_pipe.verify(run) == []


def test_a_pruned_run_answers_by_what_it_keeps_and_one_loss_leaves_the_other(run: Path) -> None:
    keep(run)
    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    assert hydra_pipe.prune(run) > 0
    for method in ("hydra", "hydra-fisher"):
        assert hydra_pipe.reduce(run, method=method, tests="3", overwrite=True)
    with pytest.raises(
        RunError, match="only hydra-fisher, hydra and hydra-exact work without them"
    ):
        hydra_pipe.reduce(run, method="tracin")
    with pytest.raises(
        RunError, match="its gradients were pruned, and its hypergradients are kept"
    ):
        keep(run)
    flip(run / KEPT / "swept/c/1/0")
    assert hydra_pipe.verify(run, repair=True) == []
    assert RunDirectory.open(run).stages[RECORD].state == "complete"
    assert hydra_pipe.reduce(run, overwrite=True, method="hydra")
    with pytest.raises(RunError, match="only hydra and hydra-exact work without them"):
        hydra_pipe.reduce(run, method="hydra-fisher", overwrite=True)


@pytest.mark.parametrize("is_answered", [False, True])
def test_what_was_kept_in_part_is_given_up_when_that_is_asked_for(
    run: Path, is_answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_answered:  # by a sweep, before: which is no part of what is given up
        hydra_pipe.reduce(run, method="hydra-fisher")
    with monkeypatch.context() as patch, interrupted_after(9):
        in_blocks(patch, 8, 1)
        keep(run)
    with pytest.raises(RunError, match=r"--keep-hypergradients first$"):  # nothing would answer
        hydra_pipe.prune(run, discard_unfinished=True)
    assert KEEP.of("hydra-fisher") in RunDirectory.open(run).stages
    hydra_pipe.reduce(run, keep_hypergradients=True, method="hydra")
    with pytest.raises(
        RunError,
        match=r"keep hydra-fisher is not finished .* or give it up with .* prune .* "
        r"--discard-unfinished",
    ):
        hydra_pipe.prune(run)
    assert CliRunner().invoke(app, ["prune", str(run), "--discard-unfinished"]).exit_code == 0
    assert not (run / KEPT).exists()
    kept = {RECORD, KEEP.of("hydra"), REDUCE.of("hydra")} | (
        {REDUCE.of("hydra-fisher")} if is_answered else set()
    )
    assert set(RunDirectory.open(run).stages) == kept
    assert hydra_pipe.verify(run) == []
    assert hydra_pipe.reduce(run, tests="3", overwrite=True, method="hydra")


def test_the_first_steps_are_not_answered_from_a_matrix_of_all(tmp_path: Path) -> None:
    run = made_up(tmp_path / "run", 1, tested=(4,))
    keep(run)
    hydra_pipe.reduce(run, method="hydra-fisher", up_to_step=4)
    assert orders(run)["reduce hydra-fisher-upto-4"] == "backward"
