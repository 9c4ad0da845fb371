"""Runs that an earlier hydra-pipe has written are read, found healthy, and worked on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from make_archive import RUNS, said_by

import hydra_pipe

HERE = Path(__file__).parent
VERSIONS = sorted(archive.name for archive in HERE.glob("v*"))


@pytest.fixture(params=VERSIONS)
def archive(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy, beside which the pipeline is as it was when the runs were recorded; it is the working
    directory.
    """
    copy = Path(shutil.copytree(HERE / request.param, tmp_path / "archive"))
    shutil.copy(HERE / "pipeline.py", copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def whole(archive: Path) -> Path:
    return archive / "whole"


@pytest.fixture
def pruned(archive: Path) -> Path:
    return archive / "pruned"


def relevance(run: Path, method: str) -> np.ndarray:
    return np.asarray(hydra_pipe.open_run(run).relevance_array(method)[:])


@pytest.mark.parametrize("run", RUNS)
def test_an_archived_run_is_healthy_and_says_what_it_said(archive: Path, run: str) -> None:
    assert hydra_pipe.verify(archive / run) == []
    assert said_by(archive / run) == json.loads((archive / "expected.json").read_bytes())[run]


@pytest.mark.parametrize("method", ["hydra", "hydra-fisher", "tracin", "self"])
def test_what_was_reduced_is_reduced_again_to_the_same_relevance(whole: Path, method: str) -> None:
    before = relevance(whole, method)
    hydra_pipe.reduce(whole, method=method, overwrite=True)
    np.testing.assert_allclose(relevance(whole, method), before, rtol=1e-5, atol=1e-9)


def test_a_sweep_in_a_basis_is_made_again_to_the_same_relevance(whole: Path) -> None:
    before = relevance(whole, "hydra-fisher-rank-20")
    hydra_pipe.reduce(whole, rank=20, overwrite=True)
    np.testing.assert_allclose(
        relevance(whole, "hydra-fisher-rank-20"), before, rtol=1e-4, atol=1e-8
    )


def test_an_archived_run_is_worked_on(whole: Path) -> None:
    """Every stage has something to do beside what was done, and finds it in order."""
    assert hydra_pipe.probe(whole, "pipeline.py:new_samples", name="again")
    assert hydra_pipe.reduce(whole, method="hydra", probe="again")
    assert hydra_pipe.reduce(whole, method="influence")
    assert hydra_pipe.export(whole, method="influence")
    assert hydra_pipe.clean(whole, method="influence", lowest=2).is_new
    assert hydra_pipe.clean(whole, cautious=True, overwrite=True).is_new
    assert hydra_pipe.evaluate("pipeline.py", whole, "noise", left_out="0", overwrite=True).is_new
    assert hydra_pipe.report(whole, method="influence", tests="0", top=1)
    assert hydra_pipe.verify(whole) == []
    again, before = (relevance(whole, f"hydra-of-{name}") for name in ("again", "new"))
    np.testing.assert_allclose(again, before, rtol=1e-5, atol=1e-9)


def test_nothing_of_an_archived_run_is_done_again(whole: Path) -> None:
    assert not hydra_pipe.record("pipeline.py", whole, encoding="exact", test_every="epoch")
    assert not hydra_pipe.probe(whole, "pipeline.py:new_samples", name="new")
    assert not hydra_pipe.reduce(whole, method="hydra", keep_hypergradients=True)
    assert not hydra_pipe.reduce(whole)
    assert not hydra_pipe.reduce(whole, rank=20)
    assert not hydra_pipe.reduce(whole, method="hydra", by="label")
    assert not hydra_pipe.export(whole, method="hydra", top=3, full=True)
    assert not hydra_pipe.clean(whole, lowest=2, retrain=True, seeds=2, method="hydra").is_new
    assert not hydra_pipe.clean(whole, lowest=3).is_new
    assert not hydra_pipe.evaluate("pipeline.py", whole, "loo", samples="0-3").is_new
    assert not hydra_pipe.report(whole, method="hydra", tests="0-1", top=2)


def test_a_pruned_run_of_the_archive_answers_from_what_it_keeps(pruned: Path) -> None:
    before = relevance(pruned, "hydra-fisher")
    hydra_pipe.reduce(pruned, method="hydra-fisher", by="mean")
    hydra_pipe.reduce(pruned, method="hydra-fisher", tests="1", overwrite=True)
    np.testing.assert_allclose(
        relevance(pruned, "hydra-fisher-mean")[:, 0], before.mean(1), rtol=1e-5, atol=1e-9
    )
    np.testing.assert_allclose(relevance(pruned, "hydra-fisher")[:, 0], before[:, 1], rtol=1e-5)


def test_archived_runs_are_combined_as_they_were(archive: Path) -> None:
    runs = [archive / "keyed" / f"seed-{seed}" for seed in range(2)]
    assert not hydra_pipe.combine(runs, archive / "together")
    before = relevance(archive / "together", "hydra-fisher")
    assert hydra_pipe.combine(runs, archive / "together", overwrite=True)
    np.testing.assert_array_equal(relevance(archive / "together", "hydra-fisher"), before)
    opened = hydra_pipe.open_run(archive / "together")
    assert list(opened.sample_keys or []) == [f"train/{i}.png" for i in range(10)]
    assert hydra_pipe.export(archive / "together", top=2)
    assert hydra_pipe.report(archive / "together")
    assert hydra_pipe.verify(archive / "together") == []
