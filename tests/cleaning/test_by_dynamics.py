"""Labels judged by the dynamics of a recording, without reduce and without tests."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clusters import NAMES, K, N, made
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


def regression(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return (output[:, 0] - x[:, 0]).pow(2).mean()


def tokens(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.view(8, 3, 4).transpose(1, 2), (x[:, :3] > 0).long())


def several_labels(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(output, (x[:, :3] > 0).float())


def soft_labels(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, x[:, :3].softmax(1))


class Tokens(nn.Linear):
    """A model with outputs at three positions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).view(len(x), 3, 4)


@pytest.mark.parametrize(
    ("model", "loss", "error", "named"),
    [
        (nn.Linear(4, 1), regression, RunError, "one output: a regression"),
        (Tokens(4, 12), tokens, RunError, "several outputs, such as tokens"),
        (nn.Linear(4, 3), several_labels, DataError, "several .multi-label. or targets are soft"),
        (nn.Linear(4, 3), soft_labels, DataError, "several .multi-label. or targets are soft"),
    ],
)
def test_what_has_not_one_class_a_sample_is_refused_by_name(
    tmp_path: Path, model: nn.Module, loss: Any, error: type[HydraError], named: str
) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 4)
    with Recorder(model, optimizer, tmp_path / "run", 8) as recorder:
        for _ in range(2):
            with recorder.step(range(8)):
                optimizer.zero_grad()
                loss(x, model(x)).backward()
                optimizer.step()
    with pytest.raises(error, match=f"{named}.*--method hydra"):
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
    hydra_pipe.reduce(tmp_path / "run", keep_hypergradients=True, method="hydra")
    hydra_pipe.prune(tmp_path / "run")
    after = hydra_pipe.clean(tmp_path / "run", overwrite=True).drop
    assert after.drop_columns("hurts").equals(before.drop_columns("hurts"))


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
