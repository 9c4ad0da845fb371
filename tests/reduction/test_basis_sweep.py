"""`hydra-fisher` in a basis against a float64 loop in the same basis, and its basis."""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from made_up import (
    adamw,
    blocks_of,
    by_loop,
    in_blocks,
    interrupted_after,
    made_up,
    relevance,
    root_of,
    rows_and_tests,
    swept,
)
from support.compare import relative_error
from support.pipelines import conv_pipeline, mlp_pipeline

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.errors import BudgetError, UsageError
from hydra_pipe.maths.fisher import FORMS
from hydra_pipe.plan import chunking
from hydra_pipe.reduction.basis import Basis, Rotated, fitted
from hydra_pipe.reduction.parts import parts_of
from hydra_pipe.reduction.solvers import basis_sweep, hypergradient_matrix, sweep
from hydra_pipe.store.data import save_interval
from hydra_pipe.store.data.gradients import Gradients
from hydra_pipe.store.run.results import parse_rank


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that steps begin and end within files, and lie across two."""
    monkeypatch.setattr(chunking, "MAX_SHARD_ROWS", 12)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_up(tmp_path / "run", 2)


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> list[Basis]:
    """The bases that reductions find."""
    found, real = [], basis_sweep.find_basis

    def find(job: object) -> object:
        direction = real(job)
        found.append(direction._basis)
        return direction

    monkeypatch.setattr(basis_sweep, "find_basis", find)
    return found


def features_of(part: object, store: Gradients) -> np.ndarray:
    """The features of `whole` that a part has, in its order."""
    block = blocks_of(store)
    return np.concatenate([np.flatnonzero(block == run.block) for run in part.sides[0]])


def box(basis: Basis, taken: tuple, store: Gradients) -> np.ndarray:
    """The directions of a box times D^(1/2), in the features of `whole`: (feature, coordinate)."""
    n = len(blocks_of(store))
    found = []
    for part, directions, sizes in zip(basis.parts, basis.directions, taken, strict=True):
        sides = [
            own[:, :size].astype(np.float64) for own, size in zip(directions, sizes, strict=True)
        ]
        own = sides[0] if len(sides) == 1 else np.kron(*sides)
        whole = np.zeros((n, own.shape[1]))
        whole[features_of(part, store)] = own
        found.append(whole)
    return np.concatenate(found, axis=1)


def by_loop_in_basis(run: Path, basis: Basis) -> np.ndarray:
    """The core swept as all features are; for each test its gradient in each shell, as one
    coordinate each, swept in the same way."""
    store = hydra_pipe.open_run(run).gradients
    rows, tests = rows_and_tests(store)
    root = root_of(store, store.test_steps()[-1], factored=True) * np.ones(rows.shape[1])
    block, series = blocks_of(store), store.schedules()[1]
    boxes = [box(basis, taken, store) for taken in basis.boxes]
    # orthonormal where D is: a projection on the span is U U.T
    spans = [
        np.divide(own, root[:, None], out=np.zeros_like(own), where=root[:, None] > 0)
        for own in boxes
    ]
    core = np.concatenate(
        [
            np.full(int(np.prod(taken)), part.sides[0][0].block)
            for part, taken in zip(basis.parts, basis.boxes[0], strict=True)
        ]
    ).astype(int)
    inside = [(tests * root) @ span @ span.T for span in spans] + [tests * root]
    shells = [outer - inner for inner, outer in pairwise(inside)]
    first = {number: int(np.flatnonzero(series == number)[0]) for number in set(series.tolist())}
    total = 0
    for form in FORMS:
        found = swept(store, rows @ boxes[0], (tests @ boxes[0]).T, core, form)
        for j in range(len(tests)):
            units, of = [], []
            for shell in shells:
                for number in sorted(first):
                    own = np.where(series[block] == number, shell[j], 0.0)
                    if np.linalg.norm(own) > 1e-4 * np.linalg.norm(tests[j] * root):
                        units.append(own / np.linalg.norm(own))
                        of.append(first[number])
            if units:
                along = np.stack(units, axis=1)
                start = along.T @ (tests[j] * root)
                found[:, j] += swept(
                    store, (rows * root) @ along, start[:, None], np.array(of), form
                )[:, 0]
        total = total + form.share * found
    return total


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("rank", [1, 3, 8, 20])
def test_a_sweep_in_a_basis_is_that_of_a_float64_loop(
    tmp_path: Path, n_ranks: int, rank: int, bases: list[Basis]
) -> None:
    run = made_up(tmp_path / "run", n_ranks)
    hydra_pipe.reduce(run, method="hydra-fisher", rank=rank)
    expected = by_loop_in_basis(run, bases[0])
    assert 0 < bases[0].width <= rank
    found = relevance(run, f"hydra-fisher-rank-{rank}")
    assert relative_error(found, expected) < 1e-3
    # it is not the sweep over all features, and comes near to it
    whole = by_loop(run)
    assert relative_error(found, whole) > 0.01
    assert hydra_pipe.verify(run) == []


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: mlp_pipeline(epochs=3), {"encoding": "exact"}),
        (lambda: adamw(epochs=3), {"encoding": "exact", "dtype": "float32"}),
        (lambda: adamw(epochs=3), {"encoding": "projected", "dim": 60}),
        (conv_pipeline, {"dtype": "int8"}),
    ],
    ids=["SGD", "AdamW", "AdamW, projected", "convolutions, groups, clipped"],
)
def test_every_encoding_and_optimizer_has_a_basis(
    tmp_path: Path,
    build: Callable[[], Pipeline],
    options: dict[str, object],
    bases: list[Basis],
) -> None:
    hydra_pipe.record(build(), tmp_path / "run", **options)
    hydra_pipe.reduce(tmp_path / "run", method="hydra-fisher", rank=12)
    found = relevance(tmp_path / "run", "hydra-fisher-rank-12")
    assert relative_error(found, by_loop_in_basis(tmp_path / "run", bases[0])) < 1e-3


def test_means_are_means_of_the_answers_to_their_tests(run: Path) -> None:
    for by in (None, "label", "mean"):
        hydra_pipe.reduce(run, method="hydra-fisher", rank=6, by=by)
    each = relevance(run, "hydra-fisher-rank-6")
    means = np.stack([each[:, label::3].mean(axis=1) for label in range(3)], axis=1)
    assert relative_error(relevance(run, "hydra-fisher-rank-6-by-label"), means) < 1e-4
    whole = relevance(run, "hydra-fisher-rank-6-mean")[:, 0]
    assert relative_error(whole, each.mean(axis=1)) < 1e-4


@pytest.mark.parametrize(("width", "workers"), [(1, 1), (4, 2), (6, 2)])
@pytest.mark.parametrize("by", [None, "label"])
def test_any_division_of_the_columns_gives_the_same(
    run: Path, width: int, workers: int, by: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(run, run.with_name("other"))
    hydra_pipe.reduce(other, method="hydra-fisher", rank=6, by=by)
    in_blocks(monkeypatch, width, workers)
    hydra_pipe.reduce(run, method="hydra-fisher", rank=6, by=by)
    name = "hydra-fisher-rank-6" + ("" if by is None else "-by-label")
    assert relative_error(relevance(run, name), relevance(other, name)) < 1e-4


@pytest.mark.parametrize("after", [0, 4, 13, 20])
def test_a_sweep_goes_on_in_its_middle_and_in_its_basis_to_the_same_bytes(
    run: Path, after: int, bases: list[Basis], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(run, run.with_name("other"))
    in_blocks(monkeypatch, 4, 1)
    monkeypatch.setattr(save_interval, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(save_interval, "TIMES_ITS_COST", 0.0)
    hydra_pipe.reduce(other, method="hydra-fisher", rank=6)
    with interrupted_after(after):
        hydra_pipe.reduce(run, method="hydra-fisher", rank=6)
    # another basis would be as good, and the state of the sweep would be of no use in it
    monkeypatch.setattr(basis_sweep, "fitted", None)
    real, again = sweep._step, []
    monkeypatch.setattr(
        sweep, "_step", lambda *arguments: (again.append(arguments), real(*arguments))
    )
    hydra_pipe.reduce(run, method="hydra-fisher", rank=6)
    assert len(again) == 21 - after  # seven steps of three blocks
    name = "hydra-fisher-rank-6"
    assert np.array_equal(relevance(run, name), relevance(other, name))
    assert not list((run / "relevance.zarr").rglob("sweep-*"))
    assert hydra_pipe.verify(run) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:40] + b"x" + content[41:],
        lambda _: b"",
    ],
    ids=["shorter", "another byte", "empty"],
)
def test_a_damaged_basis_is_found_again(
    run: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(run, run.with_name("other"))
    hydra_pipe.reduce(other, method="hydra-fisher", rank=6)
    with interrupted_after(0):
        hydra_pipe.reduce(run, method="hydra-fisher", rank=6)
    kept = run / "relevance.zarr/hydra-fisher-rank-6/sweep-basis"
    kept.write_bytes(damage(kept.read_bytes()))
    hydra_pipe.reduce(run, method="hydra-fisher", rank=6)
    name = "hydra-fisher-rank-6"
    assert np.array_equal(relevance(run, name), relevance(other, name))


def test_a_basis_is_taken_where_there_are_many_features_and_no_rank_is_given(
    run: Path, bases: list[Basis], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_loop(run)
    hydra_pipe.reduce(run, method="hydra-fisher")
    assert not bases
    assert relative_error(relevance(run), expected) < 3e-4
    monkeypatch.setattr(hypergradient_matrix, "default_rank", lambda n_rows, width: 6)
    hydra_pipe.reduce(run, method="hydra-fisher", overwrite=True)
    assert [basis.width <= 6 for basis in bases] == [True]
    hydra_pipe.reduce(run, method="hydra-fisher", rank="full")
    assert len(bases) == 1
    assert relative_error(relevance(run, "hydra-fisher-rank-full"), expected) < 3e-4
    # kept hypergradients have all features: they answer where no number of columns is asked for
    hydra_pipe.reduce(run, method="hydra-fisher", keep_hypergradients=True, overwrite=True)
    assert relative_error(relevance(run), expected) < 3e-4
    hydra_pipe.reduce(run, method="hydra-fisher", rank=6)
    assert len(bases) == 2
    assert relative_error(relevance(run, "hydra-fisher-rank-6"), expected) > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--rank 0: give 1 or more"),
        ({"rank": 6, "keep_hypergradients": True}, "--rank and --keep-hypergradients: choose one"),
        ({"rank": 6, "method": "hydra"}, "--rank is for --method hydra-fisher and hydra-exact"),
        ({"rank": "full", "method": "hydra-exact"}, "--rank full: hydra-exact replays all"),
    ],
)
def test_ranks_that_mean_nothing_are_refused(
    run: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        hydra_pipe.reduce(run, **{"method": "hydra-fisher"} | options)
    with pytest.raises(UsageError, match="--rank some: give a number, such as 512, or full"):
        parse_rank("some")


def test_the_plan_bounds_the_basis(run: Path, bases: list[Basis]) -> None:
    found = hydra_pipe.plan_reduction(run, method="hydra-fisher", rank=6).plans[0]
    hydra_pipe.reduce(run, method="hydra-fisher", rank=6)
    held = sum(own.nbytes for own in bases[0].arrays().values())
    assert 0 < held <= found.basis_bytes
    assert found.rank == 6
    with pytest.raises(BudgetError, match="raise --memory to"):
        hydra_pipe.reduce(run, method="hydra-fisher", rank=5, memory="100MiB")


def test_features_without_any_gradient_have_no_direction(run: Path) -> None:
    store = hydra_pipe.open_run(run).gradients
    parts = parts_of(store.layout, store.schedules()[1])
    none = [tuple(np.zeros((4, width), np.float32) for width in part.widths) for part in parts]
    basis = fitted(parts, None, [none, none], 6)
    assert basis.width == 0
    tests = Rotated(basis.multiplied(none), basis.rotated(none).along)
    assert not basis.squared_norms(tests, none).any()


def test_rows_that_are_not_finite_have_no_part_in_the_basis(run: Path) -> None:
    store = hydra_pipe.open_run(run).gradients
    parts = parts_of(store.layout, store.schedules()[1])
    generator = np.random.default_rng(0)
    rows = [
        tuple(generator.standard_normal((6, width)).astype(np.float32) for width in part.widths)
        for part in parts
    ]
    found = fitted(parts, None, [[tuple(side[:4] for side in own) for own in rows]], 6)
    rows[0][0][4], rows[-1][0][5] = np.nan, 1e30
    again = fitted(parts, None, [rows], 6)
    assert again.boxes == found.boxes
    for name, own in found.arrays().items():
        assert np.array_equal(again.arrays()[name], own)
