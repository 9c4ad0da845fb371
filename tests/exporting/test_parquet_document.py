"""Every block of docs/parquet.md runs as it stands there, and the tools answer what NumPy does."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from support.pipelines import mlp_pipeline

import hydra_pipe
from hydra_pipe.plan import exporting as planning

ROOT = Path(__file__).parents[2]
N_TRAIN, N_TEST = 40, 9
BLOCK = re.compile(r"^```(sql|python)\n(?:--|#) ([^:\n]+): (.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {
    part.split("\n", 1)[0]: [
        (language, question, text) for language, question, text in BLOCK.findall(part)
    ]
    for part in (ROOT / "docs" / "parquet.md").read_text().split("\n## ")[1:]
}
TOOLS = ["DuckDB", "Polars", "pandas", "PyArrow", "Spark"]
QUESTIONS = [
    "most harmful",
    "top of a test",
    "own metadata",
    "pairs of classes",
    "methods",
    "every pair",
]
Rows = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that paths begin in: one for all, for Spark keeps to that in which it was
    started.
    """
    return tmp_path_factory.mktemp("parquet")


@pytest.fixture(scope="module", params=["integers", "names"])
def exported(request: pytest.FixtureRequest, where: Path) -> Iterator[Path]:
    """Where `runs/mine` is: two methods, row groups of four test samples, and labels of either
    kind.
    """
    words = {}
    if request.param == "names":
        pipeline = mlp_pipeline()
        kinds = np.array(["cat", "dog", "eel", "fox"])
        words = {
            "sample_labels": kinds[pipeline.train.tensors[1]].tolist(),
            "test_labels": kinds[pipeline.test.tensors[1]].tolist(),
        }
    run = where / "runs" / "mine"
    hydra_pipe.record(mlp_pipeline(n_train=N_TRAIN, n_test=N_TEST, **words), run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "GROUP_ROWS", 4 * N_TRAIN)
        for method in ("hydra-fisher", "grad-cos"):
            hydra_pipe.reduce(run, method=method)
            hydra_pipe.export(run, method=method, top=15, full=True)
    cameras = pd.DataFrame(
        {
            "train_id": np.arange(N_TRAIN),
            "camera": np.where(np.arange(N_TRAIN) % 3 == 0, "left", "right"),
        }
    )
    cameras.to_parquet(where / "mine.parquet")
    yield where
    shutil.rmtree(where / "runs")


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The session that the document's `getOrCreate` gets: one thread, and as little of everything
    as will do.
    """
    if importlib.util.find_spec("pyspark") is None:
        pytest.skip("pyspark is not installed: pip install 'hydra-pipe[spark]'")
    if shutil.which("java") is None:
        pytest.skip(
            "Spark needs Java, and there is no java: install a JRE, such as Debian's "
            "default-jre-headless"
        )
    from pyspark.sql import SparkSession

    small = {
        # Java compiles what it runs once as quickly as it can, and Spark does not write Java for
        # each query
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xshare:auto",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "512m",
        "spark.sql.shuffle.partitions": "1",
        "spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse")),
        "spark.ui.enabled": "false",
    }
    builder = SparkSession.builder.master("local[1]")
    for key, value in small.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    yield session
    session.stop()


def rows_of(answer: Any) -> Rows:
    """What any of the tools calls a table, as plain rows."""
    if isinstance(answer, pd.DataFrame):
        return list(answer.itertuples(index=False, name=None))
    if isinstance(answer, pl.DataFrame):
        return answer.rows()
    if isinstance(answer, pa.Table):
        return list(zip(*(column.to_pylist() for column in answer.columns), strict=True))
    if isinstance(answer, duckdb.DuckDBPyRelation):
        return answer.fetchall()
    return list(map(tuple, answer.collect())) if hasattr(answer, "collect") else answer


def answers_of(tool: str) -> dict[str, Any]:
    """What the blocks of a section give, each run after those before it."""
    found, namespace = {}, {}
    for language, question, text in SECTIONS[tool]:
        if language == "sql":
            found[question] = duckdb.sql("-- " + text)
        else:
            exec(compile("# " + text, f"docs/parquet.md, {tool}, {question}", "exec"), namespace)
            found[question] = namespace["answer"]
    return found


def truth_of(where: Path) -> dict[str, Rows]:
    """The answers by NumPy, from `relevance.zarr`."""
    run = hydra_pipe.open_run(where / "runs" / "mine")
    relevance = run.relevance("hydra-fisher")
    train, test = (relevance[f"{which}_label"].to_numpy().tolist() for which in ("sample", "test"))
    values = relevance.to_numpy()
    sums, column = values.sum(1, dtype=float), values[:, 3]
    harmful = np.argsort(sums, kind="stable")[:10]
    helpful = [i for i in np.argsort(-column, kind="stable") if column[i] > 0][:10]
    cells = [
        (a, b, float(np.mean(own, dtype=float)), own.size)
        for a in sorted(set(train))
        for b in sorted(set(test))
        for own in [values[np.ix_(np.array(train) == a, np.array(test) == b)]]
    ]
    counts = []
    for method in ("grad-cos", "hydra-fisher"):
        of_method = np.asarray(run.relevance(method))
        worst = {int(i) for c in of_method.T for i in np.argsort(c, kind="stable")[:10] if c[i] < 0}
        counts.append((method, len(worst)))
    left = np.arange(N_TRAIN) % 3 == 0
    return {
        "most harmful": [(int(i), train[i], sums[i]) for i in harmful],
        "top of a test": [
            (n, int(i), float(column[i]), test[3], train[i]) for n, i in enumerate(helpful, start=1)
        ],
        "own metadata": [("left", sums[left].sum()), ("right", sums[~left].sum())],
        "pairs of classes": sorted(cells, key=lambda cell: cell[2])[:5],
        "methods": counts,
        "every pair": [(float(column.mean(dtype=float)), int((column < 0).sum()))],
    }


def assert_same(found: Rows, expected: Rows) -> None:
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert list(row) == [
            pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            for value in wanted
        ]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_answers_what_numpy_does(
    exported: Path, tool: str, request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported)
    if tool == "Spark":
        request.getfixturevalue("spark")
    found, expected = answers_of(tool), truth_of(exported)
    for question in QUESTIONS:
        assert_same(rows_of(found[question]), expected[question])
    if tool == "PyArrow":
        assert found["push-down"] == (1, 3)
    if tool == "DuckDB":
        groups = [
            (Path(file).name, number, rows, int(first), int(last))
            for file, number, rows, first, last in found["row groups"].fetchall()
        ]
        assert groups == [
            ("part-00000.parquet", 0, 160, 0, 3),
            ("part-00000.parquet", 1, 160, 4, 7),
            ("part-00000.parquet", 2, 40, 8, 8),
        ]


def test_every_block_of_the_document_is_run() -> None:
    text = (ROOT / "docs" / "parquet.md").read_text()
    assert sum(map(len, SECTIONS.values())) == text.count("```") // 2
    for tool in TOOLS:
        assert [question for _, question, _ in SECTIONS[tool] if question in QUESTIONS] == QUESTIONS
