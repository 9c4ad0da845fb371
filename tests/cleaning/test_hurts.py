"""The tests that a proposed sample hurts most stand beside it once the run was reduced."""

from pathlib import Path

import duckdb
import numpy as np
import pytest
from support.mislabelled import small

import hydra_pipe
from hydra_pipe.cleaning import evidence, hurts


@pytest.mark.parametrize("block", [1, 2**26])
def test_the_lowest_relevance_below_zero_names_the_tests(
    run: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(evidence, "BLOCK_BYTES", block)
    hydra_pipe.clean(run, lowest=9)
    relevance = np.asarray(hydra_pipe.open_run(run).relevance("hydra"))
    file = run / "cleaning" / "method=dynamics" / "drop.parquet"
    rows = duckdb.sql(f"SELECT train_id, hurts FROM '{file}'").fetchall()
    assert len(rows) == 9
    for sample, named in rows:
        own = relevance[sample]
        order = [test for test in np.argsort(own, kind="stable") if own[test] < 0]
        assert named == order[: hurts.MOST]


def test_they_come_with_a_later_reduce_and_go_with_the_relevance(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hydra_pipe.record(small(), run)
    before = hydra_pipe.clean(run, lowest=6, retrain=True, pipeline=small())
    assert before.drop.column("hurts").null_count == 6
    hydra_pipe.reduce(run, method="tracin")
    found = hydra_pipe.clean(run, lowest=6)
    assert found.is_new
    assert found.drop.column("hurts").null_count == 0
    assert found.summary["hurts"]["method"] == "tracin"
    assert found.retraining == before.retraining
    again = hydra_pipe.clean(run, lowest=6, retrain=True, pipeline=small())
    assert not again.is_new, "retrainings stay what they were"
    hydra_pipe.reduce(run)
    assert hydra_pipe.clean(run, lowest=6).summary["hurts"]["method"] == "hydra-fisher"
    assert hydra_pipe.verify(run) == []


def test_relevance_that_proposes_also_tells(run: Path) -> None:
    hydra_pipe.reduce(run, by="mean", method="hydra")
    assert hydra_pipe.clean(run, method="hydra", lowest=4).drop.column("hurts").null_count == 0
    mean = hydra_pipe.clean(run, method="hydra-mean", lowest=4)
    assert mean.drop.column("hurts").null_count == 4
