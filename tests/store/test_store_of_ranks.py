"""A store of several processes reads as one run: the same rows written in one part and in three, of
several shards each.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest

from hydra_pipe.errors import StoreError
from hydra_pipe.plan import chunking
from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.plan.records import Reading
from hydra_pipe.plan.sums import SumInput, SumPlan, plan_sums
from hydra_pipe.reduction.executors.base import Workers
from hydra_pipe.reduction.job import ReductionJob
from hydra_pipe.reduction.solvers import sums
from hydra_pipe.reduction.solvers.common import reduction_input
from hydra_pipe.reduction.solvers.sums import graphs
from hydra_pipe.reduction.weights import RowUse, hydra_weights
from hydra_pipe.store import names
from hydra_pipe.store.data import relevance as relevance_module
from hydra_pipe.store.data.gradients import BLOCK_COLUMNS, GROUP_COLUMNS, Gradients
from hydra_pipe.store.data.gradients_writer import GradientsWriter
from hydra_pipe.store.data.probes import WhichTests
from hydra_pipe.store.data.relevance import ResultColumns, create_relevance, open_relevance

LAYOUT = Layout(
    (Block("w", (7, 5), 0, "factored", (0, 7), (7, 12)), Block("c", (9,), 0, "dense", (12, 21))),
    21,
    0,
)
N_SAMPLES, N_STEPS, SHARD_ROWS = 30, 20, 8
AT_END = WhichTests(N_STEPS)
# rows of each rank in a step
SIZES = [(1, 2, 3), (2, 3, 1), (2, 1, 2)]
RUN_ID = "0" * 32
ALL = ResultColumns(((0, 4),))
WORDS = {"method": "hydra", "sign": "as it is", "unit": "test loss"}


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Paths of the store of one process, and of that of three, with shards of 8 rows."""
    for module, name in ((relevance_module, "CHUNK_SAMPLES"), (sums, "SAMPLE_MULTIPLE")):
        monkeypatch.setattr(module, name, 8)
    monkeypatch.setattr(chunking, "SHARD_BYTES", SHARD_ROWS * 21 * 4)
    monkeypatch.setattr(chunking, "CHUNK_BYTES", SHARD_ROWS // 2 * 21 * 4)
    generator = np.random.default_rng(0)
    one = writer_of(tmp_path / "one", 0, 1)
    three = [writer_of(tmp_path / "three", rank, 3) for rank in range(3)]
    for step in range(N_STEPS):
        settings: dict[str, Any] = {name: [0.1] for name in GROUP_COLUMNS} | {
            name: [1, 1] for name in BLOCK_COLUMNS
        }
        settings |= {names.GRADIENT_SCALE: 0.5, names.LOSS: float(step), names.IMBALANCE: 0.0}
        first = one.rows.n_rows
        for writer, n_rows in zip(three, SIZES[step % 3], strict=True):
            rows = {
                names.GRADIENT: generator.standard_normal((n_rows, 21)),
                names.SCALE: generator.random((n_rows, 2)),
                names.SAMPLE: generator.integers(0, N_SAMPLES, n_rows),
                names.STEP: np.full(n_rows, step),
            }
            writer.append_step(
                settings | {names.FIRST_ROW: writer.rows.n_rows, names.N_ROWS: n_rows}
            )
            put(writer.rows, rows)
            put(one.rows, rows)
        one.append_step(settings | {names.FIRST_ROW: first, names.N_ROWS: sum(SIZES[step % 3])})
    tests = {
        names.GRADIENT: generator.standard_normal((4, 21)),
        names.SCALE: generator.random((4, 2)),
        names.LOSS: np.zeros(4),
    }
    for writer in (one, three[0]):
        table = writer.test_rows(N_STEPS)
        put(table, tests)
        writer.flush_test(table)
    for writer in (one, *three):
        writer.close()
    return tmp_path / "one", tmp_path / "three"


def sizes(store: Gradients, n_threads: int) -> SumInput:
    workers = Workers(n_threads, processes=False, threads=n_threads, resident_bytes=0)
    return SumInput(**vars(reduction_input(store, AT_END, N_SAMPLES, ALL, 2**40, workers)))


def writer_of(path: Path, rank: int, n_ranks: int) -> GradientsWriter:
    return GradientsWriter(path, LAYOUT, "float32", 1, RUN_ID, rank=rank, n_ranks=n_ranks)


def put(table: Any, rows: dict[str, Any]) -> None:
    for which, views in table.reserve(len(next(iter(rows.values())))):
        for name, values in rows.items():
            views[name][:] = values[which]


def in_parts(store: Gradients, values: np.ndarray) -> np.ndarray:
    """Rows of the store of one process in the order of that of three."""
    ranks = np.concatenate([np.repeat(range(3), SIZES[step % 3]) for step in range(N_STEPS)])
    return values[np.argsort(ranks, kind="stable")]


def test_rows_are_those_of_each_part_one_after_the_other(stores: tuple[Path, Path]) -> None:
    one, three = map(Gradients, stores)
    assert (three.n_ranks, three.rows.n_rows, three.n_steps) == (3, one.rows.n_rows, N_STEPS)
    everything = slice(0, one.rows.n_rows)
    readers = [
        lambda store, rows: store.rows.features(rows, slice(0, 21)),
        lambda store, rows: store.rows.features(rows, slice(3, 15)),
        lambda store, rows: store.rows.scales(rows),
        lambda store, rows: store.samples(rows),
        lambda store, rows: store.step_of_rows(rows),
    ]
    for read in readers:
        truth = in_parts(one, read(one, everything))
        for rows in (
            everything,
            slice(0, 8),
            slice(5, 35),
            slice(28, 40),
            slice(100, 103),
            slice(0, 0),
        ):
            np.testing.assert_array_equal(read(three, rows), truth[rows])
    first, counts = three.rows_of_steps()
    assert counts.tolist() == [list(SIZES[step % 3]) for step in range(N_STEPS)]
    steps = three.step_of_rows(everything)
    for step in range(N_STEPS):
        assert all(
            (steps[a : a + n] == step).all() for a, n in zip(first[step], counts[step], strict=True)
        )


@pytest.mark.parametrize("workers", [1, 2, 5, 9])
def test_relevance_is_independent_of_the_parts(
    stores: tuple[Path, Path], tmp_path: Path, workers: int
) -> None:
    found = []
    for path in stores:
        store = Gradients(path)
        given = sizes(store, workers)
        plan = plan_sums(given, None)
        assert all(start in shard_starts(store.rows.part_rows) for start, _ in plan.row_runs)
        for asked in orders_of(plan):
            rows: list[int] = []
            found.append(relevance_by(asked, store, tmp_path / f"{path.name} {len(found)}", rows))
            assert sum(rows) == store.rows.n_rows * asked.passes
    for relevance in found[1:]:
        np.testing.assert_allclose(relevance, found[0], atol=1e-5 * np.abs(found[0]).max())


def orders_of(plan: SumPlan) -> Iterator[SumPlan]:
    """The same work in both orders, with whole rows and windows of them, in one pass and in
    several.
    """
    for rows, features in ((SHARD_ROWS, 21), (SHARD_ROWS // 2, 9)):
        reading = Reading(rows, features)
        for tests in (((0, 4),), ((0, 2), (2, 4))):
            yield replace(plan, order="score first", test_blocks=tests, reading=reading)
            for samples in (((0, N_SAMPLES),), ((0, 8), (8, 16), (16, 24), (24, N_SAMPLES))):
                yield replace(
                    plan,
                    order="fold first",
                    test_blocks=tests,
                    sample_blocks=samples,
                    reading=reading,
                )


def job_of(plan: SumPlan, store: Gradients, target: Path) -> ReductionJob[SumPlan]:
    return ReductionJob(
        store.path,
        AT_END,
        target / "hydra",
        N_SAMPLES,
        ALL.tests,
        None,
        None,
        plan,
        RowUse(hydra_weights),
    )


def relevance_by(plan: SumPlan, store: Gradients, target: Path, rows: list[int]) -> np.ndarray:
    create_relevance(target, "hydra", WORDS, N_SAMPLES, ALL, plan.test_blocks[0][1], RUN_ID)
    for _, graph in graphs(job_of(plan, store, target), rows.append):
        graph.compute(scheduler="synchronous")
    return open_relevance(target, "hydra").read()


def test_building_a_graph_computes_and_reads_nothing(
    stores: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Gradients(stores[0])
    plan = plan_sums(sizes(store, 2), None)
    shutil.rmtree(stores[0])

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr("dask.base.compute", refuse)
    with dask.config.set(scheduler=refuse):
        for asked in orders_of(plan):
            built = list(
                graphs(
                    ReductionJob(
                        store.path,
                        AT_END,
                        tmp_path / "none" / "hydra",
                        N_SAMPLES,
                        ALL.tests,
                        None,
                        None,
                        asked,
                        RowUse(hydra_weights),
                    ),
                    refuse,
                )
            )
            assert len(built) == asked.passes
    assert not (tmp_path / "none").exists()


def shard_starts(part_rows: tuple[int, ...]) -> set[int]:
    starts, end = set(), 0
    for n_rows in part_rows:
        starts |= set(range(end, end + n_rows, SHARD_ROWS))
        end += n_rows
    return starts


def test_a_rank_that_does_not_see_the_store_of_rank_0_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError,
        match="is not the store that rank 0 has made: give every rank the same run directory",
    ):
        writer_of(tmp_path / "nothing", 1, 2)
    writer_of(tmp_path / "other", 0, 2).close()
    with pytest.raises(StoreError, match="is not the store that rank 0 has made"):
        GradientsWriter(tmp_path / "other", LAYOUT, "float32", 1, "1" * 32, rank=1, n_ranks=2)
