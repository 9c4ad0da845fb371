"""A statistic of one point says that it is one: nothing is proposed, no interval is drawn."""

import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import hydra_pipe
from hydra_pipe.cli.app import app

FILE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from hydra_pipe import Pipeline

def pipeline(tests: int = 1, first: int = 0, words: bool = False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(180, 8, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    own = torch.arange(120, 180)
    own = own[y[own] >= first][:tests]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    loss = lambda output, target: nn.functional.cross_entropy(output, target, reduction="none")
    names = {}
    if words:
        names = {
            "sample_labels": [f"class {int(v)}" for v in y[:120]],
            "test_labels": [f"class {int(v)}" for v in y[own]],
        }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train, test = TensorDataset(x[:120], y[:120]), TensorDataset(x[own], y[own])
    return Pipeline(model=model, optimizer=optimizer, loss=loss, train=train, test=test,
                    batch_size=20, epochs=2, **names)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("few") / "few.py"
    path.write_text(FILE)
    return str(path)


def recorded(file: str, run: Path, **settings: object) -> Path:
    hydra_pipe.record(file, run, settings=settings)
    hydra_pipe.reduce(run, method="hydra")
    return run


def test_one_test_sample_proposes_nothing_and_says_so(file: str, tmp_path: Path) -> None:
    run = recorded(file, tmp_path / "run")
    found = hydra_pipe.clean(run, method="hydra")
    assert found.drop.num_rows == 0
    assert any("one test sample" in line for line in found.summary["says"])
    asked = hydra_pipe.clean(run, lowest=5, overwrite=True, method="hydra")
    assert asked.drop.num_rows == 5
    assert any("one test sample" in line for line in asked.summary["says"])
    hydra_pipe.reduce(run, by="mean", method="hydra")
    assert any(
        "one test sample" in line
        for line in hydra_pipe.clean(run, method="hydra-mean").summary["says"]
    )


@pytest.mark.parametrize("words", [False, True])
def test_labels_without_tests_are_not_proposed_and_are_named(
    file: str, tmp_path: Path, words: bool
) -> None:
    run = recorded(file, tmp_path / "run", tests=20, first=1, words=words)
    labels = hydra_pipe.open_run(run).gradients.labels("train")
    lacking = "class 0" if words else 0
    found = hydra_pipe.clean(run, method="hydra")
    assert lacking not in found.drop.column("label").to_pylist()
    (told,) = [line for line in found.summary["says"] if "no test sample has" in line]
    assert told.startswith(
        f"no test sample has the label {lacking}, so nothing is known of the "
        f"{int((labels == lacking).sum())} training samples"
    )
    assert (
        lacking
        in hydra_pipe.clean(run, lowest=100, overwrite=True, method="hydra")
        .drop.column("label")
        .to_pylist()
    )
    assert not [
        line
        for line in hydra_pipe.clean(
            recorded(file, tmp_path / "all", tests=20), method="hydra"
        ).summary["says"]
        if "no test" in line
    ]


def test_evaluations_of_one_test_sample_have_no_interval_and_say_so(
    file: str, tmp_path: Path
) -> None:
    run = recorded(file, tmp_path / "run")
    for kind, name, options in (
        ("lds", "lds", {"retrainings": 10}),
        ("loo", "spearman", {"samples": "0-4"}),
        ("smoothness", "agreement", {}),
        ("qld", "harmful_over_random", {}),
        ("subset", "flipped", {}),
    ):
        found = hydra_pipe.evaluate(file, run, kind, **options)
        assert all(
            math.isnan(row[f"{name}_low"]) and math.isfinite(row[name]) for row in found.rows
        ), kind
        assert any("one test sample" in line for line in found.summary["says"]), kind
        shown = CliRunner().invoke(
            app, ["evaluate", file, str(run), kind, *(f"--{k}={v}" for k, v in options.items())]
        )
        assert shown.exit_code == 0, shown.output
        assert "nan" not in shown.stdout
        assert "one test sample" in shown.stdout


def test_a_rank_correlation_over_one_or_two_samples_is_left_out(file: str, tmp_path: Path) -> None:
    run = recorded(file, tmp_path / "run", tests=10)
    for samples in ("3", "3-4"):
        found = hydra_pipe.evaluate(
            file, run, "loo", settings={"tests": 10}, samples=samples, overwrite=True
        )
        assert np.isnan([row["spearman"] for row in found.rows]).all()
        assert any(
            (
                "are too few for Spearman's correlation, which is left out: leave out 3 or more, "
                "by --samples"
            )
            in line
            for line in found.summary["says"]
        )


def test_retraining_with_one_test_sample_says_what_it_is_worth(file: str, tmp_path: Path) -> None:
    run = recorded(file, tmp_path / "run")
    found = hydra_pipe.clean(run, lowest=5, retrain=True, seeds=1, method="hydra")
    assert any("one test sample" in line for line in found.summary["retraining"]["says"])
    shown = CliRunner().invoke(app, ["clean", str(run), "--method", "hydra", "--lowest", "5"])
    assert shown.exit_code == 0
    assert "nan" not in shown.stdout
