"""Columns of samples.parquet on the dynamics, read by DuckDB, against a loop over the recording."""

from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from support.pipelines import conv_pipeline
from torch import nn
from torch.nn import functional as F

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.exporting import dynamics, totals
from hydra_pipe.plan import exporting as plan
from hydra_pipe.store.data.recording import open_recording
from hydra_pipe.store.run.manifest import RunDirectory

COLUMNS = (
    "visits, mean_loss, last_loss, mean_margin, mean_el2n, variability, visits_wrong, first_learnt"
)


def columns(run: Path) -> dict[str, np.ma.MaskedArray]:
    file = run / "rankings" / "method=hydra" / "samples.parquet"
    found = duckdb.sql(f"SELECT {COLUMNS} FROM '{file}' ORDER BY train_id").fetchnumpy()
    return {name: np.ma.masked_array(values) for name, values in found.items()}


def exported(pipeline: Pipeline, run: Path) -> Path:
    hydra_pipe.record(pipeline, run)
    hydra_pipe.reduce(run, method="hydra")
    hydra_pipe.export(run, method="hydra")
    return run


@pytest.mark.parametrize("small", [False, True])
def test_columns_are_those_of_a_loop_over_the_visits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """With `small`, in blocks of 16 samples and of few rows."""
    if small:
        monkeypatch.setattr(dynamics, "_BLOCK", 64)
        monkeypatch.setattr(totals, "GROUP_ROWS", 8)
        monkeypatch.setattr(plan, "MOST_DYNAMICS", 16)
    run = exported(conv_pipeline(n_train=30), tmp_path / "run")
    found = columns(run)
    gradients, _ = open_recording(RunDirectory.open(run), None)
    rows = slice(0, gradients.rows.n_rows)
    logits = gradients.row_dynamics("logits", rows).astype(float)
    targets, samples = gradients.row_dynamics("target", rows), gradients.samples(rows)
    for sample in range(30):
        own = np.flatnonzero(samples == sample)
        own = own[np.argsort(gradients.step_of_rows(rows)[own])]
        losses, margins, errors, chances, hits = [], [], [], [], []
        for row in own:
            p = np.exp(logits[row]) / np.exp(logits[row]).sum()
            y = targets[row]
            losses.append(-np.log(p[y]))
            margins.append(logits[row, y] - np.delete(logits[row], y).max())
            errors.append(np.linalg.norm(p - np.eye(len(p))[y]))
            chances.append(p[y])
            hits.append(logits[row].argmax() == y)
        expected = {
            "visits": len(own),
            "mean_loss": np.mean(losses),
            "last_loss": losses[-1],
            "mean_margin": np.mean(margins),
            "mean_el2n": np.mean(errors),
            "variability": np.std(chances),
            "visits_wrong": len(hits) - sum(hits),
        }
        for name, value in expected.items():
            assert found[name][sample] == pytest.approx(value, rel=1e-4, abs=1e-5)
        first = found["first_learnt"][sample]
        assert first is np.ma.masked if not any(hits) else first == hits.index(True) + 1


def test_a_regression_has_losses_and_no_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(20, 3)
    pipeline = Pipeline(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        lambda output, target: F.mse_loss(output[:, 0], target, reduction="none"),
        torch.utils.data.TensorDataset(x, x.sum(1)),
        torch.utils.data.TensorDataset(x[:5], x[:5].sum(1)),
        batch_size=5,
        epochs=2,
    )
    found = columns(exported(pipeline, tmp_path / "run"))
    for name in ("mean_margin", "mean_el2n", "variability", "visits_wrong", "first_learnt"):
        assert found[name].mask.all()
    losses = hydra_pipe.open_run(tmp_path / "run").dynamics().groupby("train_id")["loss"]
    if losses.first().notna().all():
        np.testing.assert_allclose(found["mean_loss"], losses.mean(), rtol=1e-6)
    else:
        assert found["mean_loss"].mask.all()
