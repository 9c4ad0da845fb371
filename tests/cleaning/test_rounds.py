"""A second round: a training on the cleaned labels judges the given labels again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.mislabelled import N, small

import hydra_pipe
from hydra_pipe.cleaning import rounds
from hydra_pipe.cleaning.visits import relabelled
from hydra_pipe.errors import RunError, UsageError
from hydra_pipe.labels.dynamics import Dynamics, TopLogits
from hydra_pipe.labels.epochs import visits_of
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import CLEAN, RECORD

GIVEN = small().train.tensors[1].numpy()


def second(run: Path) -> Path:
    return run.with_name(f"{run.name}-round-2")


def test_the_given_labels_are_judged_by_a_training_on_the_cleaned_ones(run: Path) -> None:
    first = hydra_pipe.clean(run, lowest=8)
    found = hydra_pipe.clean(run, lowest=8, rounds=2, overwrite=True)
    trained = hydra_pipe.open_run(second(run)).dynamics()
    targets = trained.groupby("train_id")["target"].first().to_numpy()
    cleaned = GIVEN.copy()
    rows = first.drop.to_pylist()
    cleaned[[row["train_id"] for row in rows]] = [row["suggested_class"] for row in rows]
    assert np.array_equal(targets, cleaned)
    own = found.judged.sort_by("train_id").to_pydict()
    assert own["given_class"] == GIVEN.tolist(), "the labels that were given are judged"
    told = found.summary["rounds"]
    assert [one["n_proposed"] for one in told] == [8, 8]
    wrong = set(range(12))
    ids = [row["train_id"] for row in rows]
    assert told[0]["precision"] == len(wrong & set(ids)) / 8
    assert found.summary["says"][0].startswith("round 1: 8 proposed")
    assert found.summary["says"][1].startswith("round 2: 8 proposed")
    assert RunDirectory.open(run).command(CLEAN.of("dynamics")).endswith("--lowest 8 --rounds 2")
    assert not hydra_pipe.clean(run, lowest=8, rounds=2).is_new
    assert hydra_pipe.verify(run) == hydra_pipe.verify(second(run)) == []
    with pytest.raises(RunError, match="rounds=2"):
        hydra_pipe.clean(run, lowest=8)


def test_an_interrupted_round_goes_on_and_other_labels_are_trained_anew(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_run, recorded = rounds.record_run, []

    def counting(pipeline: object, place: Path, *more: object) -> bool:
        recorded.append(record_run(pipeline, place, *more))  # type: ignore[arg-type]
        return recorded[-1]

    def killed(*_: object) -> Dynamics:
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "record_run", counting)
    with monkeypatch.context() as patched:
        patched.setattr(rounds, "_judged_again", killed)
        with pytest.raises(KeyboardInterrupt):
            hydra_pipe.clean(run, lowest=8, rounds=2)
    hydra_pipe.clean(run, lowest=8, rounds=2)
    assert recorded == [True, False], "the second call finds the training of the first"
    hydra_pipe.clean(run, lowest=5, rounds=2, overwrite=True)
    assert recorded == [True, False, True]


def test_a_place_that_holds_another_run_is_left_alone(run: Path) -> None:
    hydra_pipe.record(small(), second(run))
    before = RunDirectory.open(second(run)).run_id
    with pytest.raises(RunError, match="holds another run"):
        hydra_pipe.clean(run, rounds=2)
    assert RunDirectory.open(second(run)).run_id == before


def test_a_pipeline_object_serves_rounds_and_retrainings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hydra_pipe.record(small(), run)
    with pytest.raises(RunError, match="rounds=2, pipeline="):
        hydra_pipe.clean(run, rounds=2)
    found = hydra_pipe.clean(run, lowest=6, rounds=3, retrain=True, pipeline=small())
    assert len(found.summary["rounds"]) == 3
    assert found.retraining
    assert RECORD in RunDirectory.open(tmp_path / "run-round-3").stages


def test_dropped_samples_are_judged_by_the_others_and_stay_out_of_the_second_training(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.csv").write_text("sample,decision,label\n1,drop,\n")
    with pytest.raises(UsageError, match="0: give 1 or more"):
        hydra_pipe.clean(run, rounds=0)
    found = hydra_pipe.clean(run, lowest=5, rounds=2, decisions=tmp_path / "own.csv")
    assert found.judged.num_rows == N
    assert {row["train_id"]: row["action"] for row in found.drop.to_pylist()}[1] == "drop"


def test_other_labels_have_their_own_logits_where_these_are_kept() -> None:
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(2, 30, 70)).astype(np.float32), rng.integers(0, 70, 30)
    largest, classes = torch.from_numpy(z).topk(8, dim=2)
    own = np.take_along_axis(z, labels[None, :, None], axis=2)[..., 0]
    total = np.log(np.exp(z).sum(axis=2))
    kept = TopLogits(own, largest.numpy(), classes.numpy(), total, 70)
    others = classes.numpy()[0, :, 3].astype(np.int64)
    changed = relabelled(Dynamics(labels, kept), others)
    expected = visits_of(Dynamics(others, z))
    found = visits_of(changed)
    np.testing.assert_allclose(found.loss[0], expected.loss[0], rtol=1e-5)
    np.testing.assert_allclose(found.margin[0], expected.margin[0], rtol=1e-4, atol=1e-5)
    assert np.isfinite(found.loss).all(), "a label that is not kept shares the rest"
