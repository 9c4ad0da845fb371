"""The Parquet tables, read back by the tools they are for."""

import shutil
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from support.pipelines import conv_pipeline

import hydra_pipe
from hydra_pipe.errors import BudgetError
from hydra_pipe.exporting import run as export_module
from hydra_pipe.exporting import source as source_module
from hydra_pipe.exporting import totals as totals_module
from hydra_pipe.plan import exporting as planning
from hydra_pipe.store.data.relevance import read_columns
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import EXPORT
from hydra_pipe.store.zarr.arrays import Array


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("export") / "run"
    hydra_pipe.record(conv_pipeline(n_train=60, n_test=90), run)
    hydra_pipe.reduce(run, method="hydra")
    return run


@pytest.fixture
def exported(reduced: Path, tmp_path: Path) -> Path:
    run = Path(shutil.copytree(reduced, tmp_path / "run"))
    hydra_pipe.export(run, top=4, full=True, method="hydra")
    return run


def tables(run: Path) -> Path:
    return run / "rankings" / "method=hydra"


def test_tables_have_the_columns_and_types_of_the_contract(exported: Path) -> None:
    def types(name: str) -> dict[str, str]:
        return {f.name: str(f.type) for f in pq.read_schema(tables(exported) / name)}

    assert types("part-00000.parquet") == {
        "test_id": "int64",
        "side": "dictionary<values=string, indices=int8, ordered=0>",
        "rank": "int32",
        "train_id": "int64",
        "relevance": "float",
        "test_label": "int64",
        "train_label": "int64",
    }
    assert types("samples.parquet") == {
        "train_id": "int64",
        "label": "int64",
        "relevance_sum": "double",
        "relevance_mean": "double",
        "rank": "int32",
        "self_relevance": "float",
        "visits": "int64",
        "mean_loss": "float",
        "last_loss": "float",
        "mean_margin": "float",
        "mean_el2n": "float",
        "variability": "float",
        "visits_wrong": "int32",
        "first_learnt": "int32",
    }
    assert types("classes.parquet") == {
        "train_label": "int64",
        "test_label": "int64",
        "relevance_mean": "double",
        "pairs": "int64",
    }
    assert types("matrix/part-00000.parquet") == {
        "test_id": "int64",
        "train_id": "int64",
        "relevance": "float",
    }


def test_method_sign_unit_and_run_stand_in_every_schema(exported: Path) -> None:
    run_id = hydra_pipe.open_run(exported).run_id
    for file in tables(exported).rglob("*.parquet"):
        metadata = {k.decode(): v.decode() for k, v in pq.read_schema(file).metadata.items()}
        assert metadata["hydra_pipe.method"] == "hydra"
        assert metadata["hydra_pipe.run_id"] == run_id
        assert "positive: helpful" in metadata["hydra_pipe.sign"]
        assert metadata["hydra_pipe.unit"] == "test loss"


def test_tables_say_what_the_matrix_says(exported: Path) -> None:
    relevance = np.asarray(hydra_pipe.open_run(exported).relevance("hydra"))
    matrix = pq.read_table(tables(exported) / "matrix").to_pandas()
    np.testing.assert_array_equal(matrix["relevance"].to_numpy().reshape(90, 60), relevance.T)
    assert matrix["test_id"].is_monotonic_increasing
    rankings = pd.concat(
        pd.read_parquet(f, partitioning=None)
        for f in sorted(tables(exported).glob("part-*.parquet"))
    )
    np.testing.assert_array_equal(
        rankings["relevance"], relevance[rankings["train_id"], rankings["test_id"]]
    )
    assert (np.sign(rankings["relevance"]) == np.where(rankings["side"] == "helpful", 1, -1)).all()
    assert rankings.groupby(["test_id", "side"], observed=True).size().eq(4).all()
    pipeline = conv_pipeline(n_train=60, n_test=90)
    np.testing.assert_array_equal(
        rankings["train_label"], pipeline.train.tensors[1][rankings["train_id"].to_numpy(copy=True)]
    )
    np.testing.assert_array_equal(
        rankings["test_label"], pipeline.test.tensors[1][rankings["test_id"].to_numpy(copy=True)]
    )
    samples = pd.read_parquet(tables(exported) / "samples.parquet", partitioning=None)
    np.testing.assert_allclose(
        samples["relevance_sum"], relevance.sum(1, dtype=np.float64), rtol=1e-12
    )
    assert (samples["visits"] == 3).all()
    assert samples.sort_values("rank")["relevance_sum"].is_monotonic_increasing
    assert samples["self_relevance"].isna().all()


def test_duckdb_polars_and_pandas_answer_the_same(exported: Path) -> None:
    files = f"{exported}/rankings/*/part-*.parquet"
    query = (
        f"SELECT train_id, relevance FROM '{files}' WHERE method = 'hydra' AND test_id = 3 AND "
        "side = 'harmful' ORDER BY rank"
    )
    duck = duckdb.sql(query).fetchall()
    frame = (
        pl.scan_parquet(files, hive_partitioning=True)
        .filter(
            (pl.col("method") == "hydra") & (pl.col("test_id") == 3) & (pl.col("side") == "harmful")
        )
        .sort("rank")
        .select("train_id", "relevance")
        .collect()
    )
    table = pd.read_parquet(tables(exported) / "part-00000.parquet", partitioning=None)
    pandas_rows = table[(table["test_id"] == 3) & (table["side"] == "harmful")].sort_values("rank")
    assert len(duck) == 4
    assert (
        duck
        == frame.rows()
        == list(pandas_rows[["train_id", "relevance"]].itertuples(index=False, name=None))
    )


def test_tables_do_not_depend_on_how_many_columns_are_read_at_once(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f.relative_to(exported): f.read_bytes() for f in tables(exported).rglob("*.parquet")}
    read: list[slice] = []

    def counted(array: Array, samples: slice, tests: slice) -> np.ndarray:
        read.append(tests)
        return read_columns(array, samples, tests)

    monkeypatch.setattr(source_module, "read_columns", counted)
    monkeypatch.setattr(planning, "GROUP_ROWS", 8 * 60)
    monkeypatch.setattr(planning, "BLOCK_BYTES", 1)
    hydra_pipe.export(exported, top=4, full=True, overwrite=True, method="hydra")
    assert len(read) == 2
    monkeypatch.setattr(planning, "BLOCK_BYTES", 2**26)
    wide = {f.relative_to(exported): f.read_bytes() for f in tables(exported).rglob("*.parquet")}
    hydra_pipe.export(exported, top=4, full=True, overwrite=True, method="hydra")
    assert len(read) == 3
    assert (
        {f.relative_to(exported): f.read_bytes() for f in tables(exported).rglob("*.parquet")}
        == wide
        != before
    )


def test_named_labels_and_unknown_labels(tmp_path: Path) -> None:
    pipeline = conv_pipeline(sample_labels=["cat", "dog"] * 13, test_labels=["eel"] * 7)
    hydra_pipe.record(pipeline, tmp_path / "named")
    unknown = conv_pipeline(loss=lambda output, target: (output[:, :1] - target).square().sum(1))
    for data in (unknown.train, unknown.test):
        data.tensors = (data.tensors[0], data.tensors[1].float()[:, None])
    hydra_pipe.record(unknown, tmp_path / "unknown")
    for run in ("named", "unknown"):
        hydra_pipe.reduce(tmp_path / run, method="hydra")
        hydra_pipe.export(tmp_path / run, method="hydra")
    named = pq.read_table(tables(tmp_path / "named") / "part-00000.parquet", partitioning=None)
    assert set(named["train_label"].to_pylist()) == {"cat", "dog"}
    assert set(named["test_label"].to_pylist()) == {"eel"}
    blank = pq.read_table(tables(tmp_path / "unknown") / "part-00000.parquet", partitioning=None)
    assert blank["train_label"].null_count == blank["test_label"].null_count == blank.num_rows > 0
    assert (
        pq.read_table(tables(tmp_path / "unknown") / "classes.parquet", partitioning=None).num_rows
        == 0
    )


def test_a_failed_export_leaves_the_old_tables(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f: f.read_bytes() for f in tables(exported).rglob("*.parquet")}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(totals_module, "rank_harmful", fail)
    with pytest.raises(OSError, match="No space"):
        hydra_pipe.export(exported, top=7, overwrite=True, method="hydra")
    assert {f: f.read_bytes() for f in tables(exported).rglob("*.parquet")} == before
    assert not list((exported / "rankings").glob("*.partial"))


def test_reducing_again_removes_rankings_of_the_old_relevance(exported: Path) -> None:
    hydra_pipe.reduce(exported, overwrite=True, method="hydra")
    assert not tables(exported).exists()
    assert hydra_pipe.export(exported, method="hydra") is True


def self_relevance(run: Path, method: str = "hydra") -> np.ndarray:
    return pq.read_table(run / "rankings" / f"method={method}" / "samples.parquet")[
        "self_relevance"
    ].to_numpy()


def test_self_relevance_is_filled_once_it_was_computed_and_stays_true(exported: Path) -> None:
    assert not hydra_pipe.export(exported, top=4, full=True, method="hydra")
    hydra_pipe.reduce(exported, method="self")
    assert hydra_pipe.verify(exported) == []
    assert hydra_pipe.export(
        exported, top=4, full=True, method="hydra"
    )  # what was written before lacks it
    assert np.array_equal(
        self_relevance(exported), np.asarray(hydra_pipe.open_run(exported).relevance("self"))[:, 0]
    )
    assert (self_relevance(exported) > 0).all()
    assert hydra_pipe.verify(exported) == []
    assert not hydra_pipe.export(exported, top=4, full=True, method="hydra")
    hydra_pipe.reduce(exported, method="self", overwrite=True)  # the same bytes
    assert not hydra_pipe.export(exported, top=4, full=True, method="hydra")


def test_tables_with_another_self_relevance_are_stale(exported: Path) -> None:
    hydra_pipe.reduce(exported, method="self")
    hydra_pipe.export(exported, top=4, full=True, method="hydra")
    directory = RunDirectory.open(exported)
    directory.stages[EXPORT.of("hydra")].facts["of_self"] = "0" * 64
    directory.save(EXPORT.of("hydra"))
    (fault,) = hydra_pipe.verify(exported)
    assert (
        "is stale: it was computed from another relevance of samples for themselves" in fault.found
    )
    assert hydra_pipe.export(exported, top=4, full=True, method="hydra")
    assert hydra_pipe.verify(exported) == []


def test_results_of_the_first_steps_have_the_self_relevance_of_these(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hydra_pipe.record(conv_pipeline(), run, test_every="epoch")
    hydra_pipe.reduce(run, up_to_step=4, method="hydra")
    hydra_pipe.reduce(run, method="self")
    hydra_pipe.export(run, method="hydra-upto-4")
    assert np.isnan(self_relevance(run, "hydra-upto-4")).all()
    hydra_pipe.reduce(run, method="self", up_to_step=4)
    hydra_pipe.export(run, method="hydra-upto-4")
    expected = np.asarray(hydra_pipe.open_run(run).relevance("self-upto-4"))[:, 0]
    assert np.array_equal(self_relevance(run, "hydra-upto-4"), expected)


def test_tables_say_the_unit_of_their_method(exported: Path) -> None:
    hydra_pipe.reduce(exported, method="grad-cos")
    hydra_pipe.export(exported, method="grad-cos")
    for file in (exported / "rankings" / "method=grad-cos").rglob("*.parquet"):
        assert pq.read_schema(file).metadata[b"hydra_pipe.unit"] == b"cosine, from -1 to 1"


def test_tables_declare_how_they_are_sorted_and_are(exported: Path) -> None:
    found = {}
    for file in sorted(tables(exported).rglob("*.parquet")):
        metadata = pq.read_metadata(file)
        group = metadata.row_group(0)
        assert all(
            metadata.row_group(i).sorting_columns == group.sorting_columns
            for i in range(metadata.num_row_groups)
        )
        order = [
            (metadata.schema.column(s.column_index).name, s.descending)
            for s in group.sorting_columns
        ]
        found[file.relative_to(tables(exported)).as_posix()] = [name for name, _ in order]
        table = pq.read_table(file, partitioning=None).to_pandas()
        table["side"] = table["side"].astype(str) if "side" in table else ""
        by, ascending = [name for name, _ in order], [not descending for _, descending in order]
        pd.testing.assert_frame_equal(
            table, table.sort_values(by, ascending=ascending, kind="stable", ignore_index=True)
        )
        for i in range(group.num_columns):
            column = group.column(i)
            assert column.is_stats_set
            assert column.has_column_index
            assert column.has_offset_index
    assert found == {
        "classes.parquet": ["train_label", "test_label"],
        "matrix/part-00000.parquet": ["test_id", "train_id"],
        "part-00000.parquet": ["test_id", "side", "rank"],
        "samples.parquet": ["train_id"],
    }


def test_row_groups_hold_whole_test_samples_in_files_of_several(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "GROUP_ROWS", 8 * 60)
    monkeypatch.setattr(planning, "FILE_ROWS", 3 * 8 * 60)
    whole = {
        name: pq.read_table(tables(exported) / name, partitioning=None)
        for name in ("part-00000.parquet", "matrix")
    }
    hydra_pipe.export(exported, top=4, full=True, overwrite=True, method="hydra")
    files = sorted((tables(exported) / "matrix").iterdir())
    spans = [
        [
            (g.column(0).statistics.min, g.column(0).statistics.max, g.num_rows)
            for g in map(m.row_group, range(m.num_row_groups))
        ]
        for m in map(pq.read_metadata, files)
    ]
    groups = [(low, min(low + 7, 89), 60 * min(8, 90 - low)) for low in range(0, 90, 8)]
    assert spans == [groups[i : i + 3] for i in range(0, 12, 3)]
    rankings = sorted(tables(exported).glob("part-*.parquet"))
    assert [pq.read_metadata(f).num_row_groups for f in rankings] == [3]
    assert pq.read_table(tables(exported) / "matrix", partitioning=None).equals(whole["matrix"])
    assert pq.read_table(rankings[0], partitioning=None).equals(whole["part-00000.parquet"])


@pytest.mark.parametrize("block_tests", [64, 4])
def test_slabs_of_very_many_samples_give_the_same_tables(
    exported: Path, monkeypatch: pytest.MonkeyPatch, block_tests: int
) -> None:
    names = ("part-00000.parquet", "matrix", "samples.parquet", "classes.parquet")
    whole = {name: pq.read_table(tables(exported) / name, partitioning=None) for name in names}
    monkeypatch.setattr(planning, "MOST_WHOLE", 50)
    monkeypatch.setattr(planning, "SLAB_SAMPLES", 25)
    plan = planning.plan_export
    monkeypatch.setattr(
        export_module, "plan_export", lambda given: replace(plan(given), block_tests=block_tests)
    )
    hydra_pipe.export(exported, top=4, full=True, overwrite=True, method="hydra")
    files = sorted((tables(exported) / "matrix").iterdir())
    assert [pq.read_metadata(f).num_rows for f in files] == [60] * 90
    assert [pq.read_metadata(files[0]).row_group(i).num_rows for i in range(3)] == [25, 25, 10]
    for name, table in whole.items():
        found = pq.read_table(tables(exported) / name, partitioning=None)
        if name == "classes.parquet":  # means, of sums of slabs
            pd.testing.assert_frame_equal(found.to_pandas(), table.to_pandas(), rtol=1e-12)
        else:
            assert found.equals(table)
    assert hydra_pipe.verify(exported) == []


def test_a_budget_that_is_too_small_is_refused_and_leaves_the_old_tables(exported: Path) -> None:
    before = {f: f.read_bytes() for f in tables(exported).rglob("*.parquet")}
    with pytest.raises(BudgetError, match="raise --memory to"):
        hydra_pipe.export(
            exported, top=4, full=True, memory="100MiB", overwrite=True, method="hydra"
        )
    assert {f: f.read_bytes() for f in tables(exported).rglob("*.parquet")} == before
    assert hydra_pipe.verify(exported) == []
    # no setting that the tables depend on
    assert not hydra_pipe.export(exported, top=4, full=True, memory="1GiB", method="hydra")
