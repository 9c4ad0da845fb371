"""Labels judged by the dynamics of a recording, without reduce and without tests."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe import Recorder
from hydra_pipe.cleaning import visits
from hydra_pipe.cleaning.visits import dynamics_of, visits_of_rows
from hydra_pipe.cli.app import app
from hydra_pipe.errors import DataError, HydraError, RunError, UsageError
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import CLEAN

N, K, N_WRONG = 300, 3, 30
NAMES = np.array(["ant", "bee", "cat"])


def made(
    path: Path,
    *,
    labels: str = "numbers",
    changing: bool = False,
    unseen: int = 0,
    tests: bool = False,
) -> np.ndarray:
    """A recorded training on three clusters; returns the ids of the wrong labels."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, K, N)
    x = torch.from_numpy(rng.normal(size=(N, 6)) + 2.5 * np.eye(K, 6)[truth]).float()
    wrong = rng.choice(N, N_WRONG, replace=False)
    given = truth.copy()
    given[wrong] = (truth[wrong] + 1) % K
    y = torch.from_numpy(given)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, K))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    named: Any = {"numbers": given, "names": NAMES[given].tolist(), "none": None}[labels]
    with Recorder(model, optimizer, path, N + unseen, sample_labels=None) as recorder:
        for epoch in range(6):
            for ids in np.split(rng.permutation(N), 10):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    target = (y[ids] + int(changing and epoch == 5)) % K
                    F.cross_entropy(model(x[ids]), target).backward()
                    optimizer.step()
        if tests:
            recorder.record_test([(x[:4], y[:4])], F.cross_entropy)
        if named is not None:
            recorder.label_samples([*named, *[named[0]] * unseen])
    return np.sort(wrong)


def test_wrong_labels_are_found_without_tests_and_without_reduce(tmp_path: Path) -> None:
    wrong = made(tmp_path / "run")
    found = hydra_pipe.clean(tmp_path / "run")
    ids = found.drop.column("train_id").to_numpy()
    assert np.isin(ids, wrong).mean() > 0.85
    assert np.isin(wrong, ids).mean() > 0.7
    assert np.array_equal(np.sort(np.concatenate([found.keep, ids])), np.arange(N))
    suggested = found.drop.column("suggested_label").to_numpy()
    given = found.drop.column("label").to_numpy()
    right = np.isin(ids, wrong)
    assert ((suggested[right] + 1) % K == given[right]).mean() > 0.9
    scores = found.drop.column("score").to_numpy()
    assert (np.diff(scores) <= 0).all()
    assert hydra_pipe.verify(tmp_path / "run") == []


def test_files_say_the_same_and_labels_keep_their_names(tmp_path: Path) -> None:
    made(tmp_path / "run", labels="names")
    found = hydra_pipe.clean(tmp_path / "run", lowest=12)
    place = tmp_path / "run" / CLEAN.of("dynamics").area
    assert [int(line) for line in (place / "keep.txt").read_text().split()] == found.keep.tolist()
    assert pq.read_table(place / "drop.parquet").equals(found.drop)
    relabel = pq.read_table(place / "relabel.parquet").to_pydict()
    assert relabel["train_id"] == found.drop.column("train_id").to_pylist()
    assert set(relabel["given"]) | set(relabel["suggested"]) <= set(NAMES.tolist())
    assert all(g != s for g, s in zip(relabel["given"], relabel["suggested"], strict=True))
    assert all("while it learnt, the network gave" in text for text in relabel["evidence"])


def test_labels_need_not_be_given_to_the_recorder(tmp_path: Path) -> None:
    made(tmp_path / "given")
    made(tmp_path / "none", labels="none")
    given, none = (hydra_pipe.clean(tmp_path / name).drop for name in ("given", "none"))
    assert given.to_pylist() == none.to_pylist()


def test_samples_that_were_never_visited_are_kept(tmp_path: Path) -> None:
    made(tmp_path / "run", unseen=5)
    found = hydra_pipe.clean(tmp_path / "run")
    assert set(range(N, N + 5)) <= set(found.keep.tolist())


def test_a_proposal_is_kept_and_is_stale_once_the_run_is_recorded_anew(tmp_path: Path) -> None:
    made(tmp_path / "run")
    assert hydra_pipe.clean(tmp_path / "run").is_new
    assert not hydra_pipe.clean(tmp_path / "run").is_new
    with pytest.raises(RunError, match="cautious"):
        hydra_pipe.clean(tmp_path / "run", cautious=True)
    cautious = hydra_pipe.clean(tmp_path / "run", cautious=True, overwrite=True)
    assert cautious.is_new
    command = RunDirectory.open(tmp_path / "run").command(CLEAN.of("dynamics"))
    assert command.endswith("--cautious")
    entry = RunDirectory.open(tmp_path / "run").stages[CLEAN.of("dynamics")]
    assert set(entry.facts) >= {"of_record", "n_samples", "n_proposed"}


def test_labels_that_change_while_training_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "run", changing=True)
    with pytest.raises(DataError, match="was trained with the label"):
        hydra_pipe.clean(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": -3.0}, UsageError, "--threshold is for relevance"),
        ({"lowest": N}, UsageError, "some must stay"),
        ({"cautious": True, "lowest": 3}, UsageError, "choose one of them"),
        ({"cautious": True, "method": "hydra"}, UsageError, "--cautious is for labels judged"),
        ({"method": "hydra"}, RunError, "hydra-pipe reduce"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, options: dict[str, Any], error: type[HydraError], message: str
) -> None:
    made(tmp_path / "run")
    with pytest.raises(error, match=message):
        hydra_pipe.clean(tmp_path / "run", **options)


def test_a_run_without_logits_says_how_labels_can_be_judged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run", 8) as recorder, recorder.step(range(8)):
        model(torch.randn(8, 4)).pow(2).mean().backward()
        optimizer.step()
    with pytest.raises(RunError, match="--method hydra to judge by relevance"):
        hydra_pipe.clean(tmp_path / "run")


def test_the_command_shows_the_most_suspicious_labels(tmp_path: Path) -> None:
    made(tmp_path / "run", labels="names")
    told = CliRunner().invoke(app, ["clean", str(tmp_path / "run")])
    assert told.exit_code == 0, told.output
    assert "labels look wrong" in told.output
    assert "relabel.parquet" in told.output


def test_visits_are_counted_for_each_sample_in_the_order_of_steps() -> None:
    samples, steps = np.array([2, 0, 2, 1, 0, 2]), np.array([0, 0, 1, 1, 2, 2])
    visit, most = visits_of_rows(samples, steps)
    assert visit.tolist() == [0, 0, 1, 0, 1, 2]
    assert most == 3


def test_a_pruned_run_is_judged_as_it_was(tmp_path: Path) -> None:
    made(tmp_path / "run", tests=True)
    before = hydra_pipe.clean(tmp_path / "run").drop
    hydra_pipe.reduce(tmp_path / "run", keep_hypergradients=True)
    hydra_pipe.prune(tmp_path / "run")
    assert hydra_pipe.clean(tmp_path / "run", overwrite=True).drop.equals(before)


def test_files_that_the_manifest_does_not_list_are_not_judged(tmp_path: Path) -> None:
    """Labels that a copy has left of an older run are not this run's."""
    made(tmp_path / "old", labels="names")
    made(tmp_path / "run", labels="none")
    left = "gradients.zarr/labels"
    shutil.copytree(tmp_path / "old" / left, tmp_path / "run" / left)
    assert set(hydra_pipe.clean(tmp_path / "run").drop.column("label").to_pylist()) <= {0, 1, 2}


def test_columns_read_in_pieces_and_fewer_visits_are_those_of_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "run")
    gradients = hydra_pipe.open_run(tmp_path / "run").gradients
    ids, whole = dynamics_of(gradients)
    assert whole.n_epochs == 6
    monkeypatch.setattr(visits, "_ROWS_AT_ONCE", 70)
    _, pieces = dynamics_of(gradients)
    assert whole.inputs is not None
    assert pieces.inputs is not None
    np.testing.assert_array_equal(pieces.logits, whole.logits)
    np.testing.assert_array_equal(pieces.inputs, whole.inputs)
    of_visit = N * (32 + 4 + 4 + 2 * K + 2 * 16)
    monkeypatch.setattr(visits, "_MOST_BYTES", 5 * of_visit - 1)
    _, few = dynamics_of(gradients)
    assert few.n_epochs == 4
    np.testing.assert_array_equal(few.logits, np.asarray(whole.logits)[[0, 2, 3, 5]])
    monkeypatch.setattr(visits, "_MOST_BYTES", 4 * of_visit - 1)
    with pytest.raises(RunError, match=r"4 visits of 300 samples take .* KiB, at most .* KiB are"):
        dynamics_of(gradients)
    assert len(ids) == N
