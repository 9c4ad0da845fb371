"""The class that each sample was trained with, and the labels of the classes."""

from pathlib import Path

import numpy as np
import pytest
from clusters import NAMES, made
from support.mislabelled import small

import hydra_pipe
from hydra_pipe.cleaning.classes import labels_of, trained_classes
from hydra_pipe.progress import Progress
from hydra_pipe.store.data.recording import open_recording
from hydra_pipe.store.run.manifest import RunDirectory


def classes_of(run: Path):  # type: ignore[no-untyped-def]
    gradients, counts = open_recording(RunDirectory.open(run), None)
    return trained_classes(gradients, counts.n_samples, Progress())


@pytest.mark.parametrize("labels", ["numbers", "none"])
def test_classes_are_the_targets_of_the_training(tmp_path: Path, labels: str) -> None:
    made(tmp_path / "run", labels=labels)
    found = classes_of(tmp_path / "run")
    assert found.labels.tolist() == [0, 1, 2]
    rows = hydra_pipe.open_run(tmp_path / "run").dynamics()
    assert np.array_equal(found.given, rows.groupby("train_id")["target"].last())


def test_names_are_those_of_the_classes_and_unvisited_samples_are_unknown(tmp_path: Path) -> None:
    made(tmp_path / "run", labels="names", unseen=4)
    found = classes_of(tmp_path / "run")
    assert found.labels.tolist() == NAMES.tolist()
    assert [found.number_of(name) for name in ("bee", "dog")] == [1, None]
    assert (found.given[-4:] == -1).all()


def test_labels_that_are_not_the_targets_are_no_classes(run: Path, tmp_path: Path) -> None:
    pipeline = small()
    pipeline.sample_labels = (pipeline.train.tensors[1] // 2).tolist()
    hydra_pipe.record(pipeline, tmp_path / "coarse")
    assert classes_of(tmp_path / "coarse") is None
    hydra_pipe.reduce(tmp_path / "coarse", method="hydra")
    found = hydra_pipe.clean(tmp_path / "coarse", method="hydra", lowest=5)
    assert found.summary["classes"] is None
    assert found.drop.column("suggested_class").null_count == 5


def test_names_that_two_classes_share_are_no_labels() -> None:
    given = np.array([0, 0, 1, 1, -1])
    names = np.array(["cat", "cat", "cat", "dog", "dog"], object)
    assert labels_of(names, given, 3).tolist() == [0, 1, 2]
    names[2] = "dog"
    assert labels_of(names, given, 3).tolist() == ["cat", "dog", "2"]
