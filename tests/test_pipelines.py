"""The pipelines that ship, on their own data, for a few steps."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.cli.app import app
from hydra_pipe.loading import load_pipeline

PIPELINES = Path(__file__).parents[1] / "pipelines"


def run(pipeline: str, directory: Path, *settings: str) -> None:
    options = [word for setting in settings for word in ("--set", setting)]
    result = CliRunner().invoke(app, ["run", str(PIPELINES / pipeline), str(directory), *options])
    assert result.exit_code == 0, result.stderr


def test_digits_finds_mislabelled_samples_far_better_than_chance(tmp_path: Path) -> None:
    run("digits.py", tmp_path / "run", "noise=0.1", "lr=0.2")
    shown = subprocess.run(
        [sys.executable, PIPELINES / "digits.py", tmp_path / "run"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "true label" in shown
    hits = int(shown.split("Of the 50 lowest-ranked, ")[1].split()[0])
    assert hits >= 25  # 5 by chance


def test_digits_noise_changes_that_many_labels_and_each_to_another() -> None:
    spec = importlib.util.spec_from_file_location("digits", PIPELINES / "digits.py")
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    _, labels, truth = digits.load(0.2, 3)
    assert (labels != truth).sum() == 280
    assert (labels[-digits.N_TEST :] == truth[-digits.N_TEST :]).all()


SHIPPED = {
    "digits.py": {"epochs": 1, "noise": 0.1},
    "fashion_mnist.py": {"data": "fashion-mnist", "n_train": 320, "n_test": 10, "epochs": 1},
    "mnist.py": {"data": "mnist", "n_train": 320, "n_test": 10, "epochs": 1, "noise": 0.2},
    "cifar10n.py": {
        "data": "cifar10",
        "n_train": 192,
        "n_test": 10,
        "epochs": 1,
        "width": 4,
        "labels": "worse",
    },
    "adult.py": {"data": "tabular", "n_train": 1000, "n_test": 20, "epochs": 1},
    "shakespeare.py": {
        "data": "text",
        "n_train": 64,
        "n_test": 8,
        "epochs": 1,
        "layers": 2,
        "width": 32,
        "context": 16,
    },
}


def shipped(pipeline: str, data: Path) -> Pipeline:
    settings = SHIPPED[pipeline]
    if "data" in settings:
        settings = settings | {"data": data / str(settings["data"])}
    return load_pipeline(str(PIPELINES / pipeline), settings).build()


@pytest.mark.data
@pytest.mark.parametrize("pipeline", sorted(SHIPPED))
def test_weights_are_those_of_training_without_recording_bit_for_bit(
    tmp_path: Path, shared_data: Path, pipeline: str
) -> None:
    plain, recorded = shipped(pipeline, shared_data), shipped(pipeline, shared_data)
    hydra_pipe.train(plain)
    hydra_pipe.record(recorded, tmp_path / "run")
    for (name, a), b in zip(
        plain.model.state_dict().items(), recorded.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    hydra_pipe.reduce(tmp_path / "run", method="hydra")
    assert np.isfinite(np.asarray(hydra_pipe.open_run(tmp_path / "run").relevance("hydra"))).all()


def test_every_pipeline_is_listed() -> None:
    assert {file.name for file in PIPELINES.glob("*.py")} == set(SHIPPED)


@pytest.mark.data
def test_fashion_mnist_runs_losslessly(tmp_path: Path, shared_data: Path) -> None:
    data = f"data={shared_data / 'fashion-mnist'}"
    run("fashion_mnist.py", tmp_path / "run", data, "n_train=640", "n_test=20", "epochs=1")
    found = hydra_pipe.open_run(tmp_path / "run")
    recording = found.info()["recording"]
    assert (recording["parameters"], recording["features"]) == (61_706, 3_390)
    assert all(block["exact"] for block in recording["blocks"])
    relevance = np.asarray(found.relevance())
    assert relevance.shape == (640, 20)
    assert np.isfinite(relevance).all()
