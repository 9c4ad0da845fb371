"""Float32 sums over many rows beside float64 ones, and runs of unusual sizes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hydra_pipe
from hydra_pipe.plan.layout import Block, Layout
from hydra_pipe.plan.records import Answered
from hydra_pipe.plan.sums import SumInput, SumPlan, plan_sums
from hydra_pipe.store import names
from hydra_pipe.store.data.gradients_writer import GradientsWriter
from hydra_pipe.store.run.footprints import seal
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import RECORD

LAYOUT = Layout(
    (
        Block("c", (40,), 0, "dense", (0, 40)),
        Block("w", (6, 10), 0, "factored", (40, 46), (46, 56)),
    ),
    56,
    0,
)


def made_up(
    path: Path, n_samples: int, n_tests: int, batches: list[np.ndarray], dtype: str = "float16"
) -> Path:
    """A finished recording of random rows, plain SGD with learning rate 0.1."""
    generator = np.random.default_rng(0)
    run = RunDirectory.create(path)
    run.begin(RECORD, {"n_samples": n_samples})
    writer = GradientsWriter(path / names.GRADIENTS, LAYOUT, dtype, 1, run.run_id)
    n_rows = 0
    # with a mean, so that sums grow and do not cancel
    pool = (0.3 + generator.standard_normal((512, 56))).astype(dtype)
    for step, samples in enumerate(batches):
        for rows, views in writer.rows.reserve(len(samples)):
            views[names.GRADIENT][:] = pool[np.arange(rows.start, rows.stop) % 512]
            views[names.SCALE][:] = 1 + (step % 7)
            views[names.SAMPLE][:] = samples[rows]
            views[names.STEP][:] = step
        line: dict[str, Any] = {
            "momentum": 0.0,
            "dampening": 0.0,
            "weight_decay": 0.0,
            "decoupled_decay": 0.0,
            "nesterov": 0,
        }
        line |= {
            "learning_rate": 0.1,
            "updated": 1,
            "momentum_started": 0,
            "step_factor": 1.0,
            names.GRADIENT_SCALE: 1.0,
        }
        writer.append_step(
            line
            | {
                names.LOSS: 0.0,
                names.IMBALANCE: 0.0,
                names.FIRST_ROW: n_rows,
                names.N_ROWS: len(samples),
            }
        )
        n_rows += len(samples)
    tests = writer.test_rows(len(batches))
    for rows, views in tests.reserve(n_tests):
        views[names.GRADIENT][:] = (0.3 + generator.standard_normal((n_tests, 56)))[rows]
        views[names.SCALE][:] = 1.0
        views[names.LOSS][:] = 0.0
    writer.flush_test(tests)
    writer.close()
    run.end(
        RECORD,
        "complete",
        n_steps=len(batches),
        n_rows=n_rows,
        n_tests=n_tests,
        checksums=seal(run, RECORD),
    )
    return path


def in_float64(run: Path) -> np.ndarray:
    """Relevance by plain products in float64."""
    store = hydra_pipe.open_run(run).gradients
    whole, n_rows = slice(0, 56), store.rows.n_rows
    tests = store.test_rows(store.n_steps).features(slice(None), whole).astype(np.float64)
    total = np.zeros((RunDirectory.open(run).stages[RECORD].count("n_samples"), len(tests)))
    for first in range(0, n_rows, 8192):
        rows = slice(first, min(first + 8192, n_rows))
        r, scale = (
            store.rows.features(rows, whole).astype(np.float64),
            store.rows.scales(rows).astype(np.float64),
        )
        scores = scale[:, :1] * (r[:, :40] @ tests[:, :40].T)
        scores += scale[:, 1:] * (r[:, 40:46] @ tests[:, 40:46].T) * (r[:, 46:] @ tests[:, 46:].T)
        np.add.at(total, store.samples(rows), 0.1 * scores)
    return total


def with_order(patch: pytest.MonkeyPatch, order: str) -> None:
    def changed(
        given: SumInput, chunks: tuple[int, int] | None, answered: Answered | None = None
    ) -> SumPlan:
        return dataclasses.replace(plan_sums(given, chunks, answered), order=order)

    patch.setattr("hydra_pipe.reduction.solvers.sums.plan_sums", changed)


@pytest.mark.parametrize("order", ["score first", "fold first"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sums_over_thousands_of_visits_keep_float32s_precision(
    tmp_path: Path, order: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """120,000 rows of 40 samples, 3,000 each.

    Rounding of each addition is at most 2^-24 of the sum: 3,000 of them at worst 1.8e-4
    of it, and as they are independent some 60 times less."""
    generator = np.random.default_rng(1)
    run = made_up(
        tmp_path / "run", 40, 5, [generator.integers(0, 40, 2000) for _ in range(60)], dtype
    )
    with_order(monkeypatch, order)
    hydra_pipe.reduce(run, method="hydra")
    truth = in_float64(run)
    found = np.asarray(hydra_pipe.open_run(run).relevance("hydra"))
    error = np.abs(found - truth).max() / np.abs(truth).max()
    assert error < 3e-6


@pytest.mark.parametrize("order", ["score first", "fold first"])
@pytest.mark.parametrize(
    "batches",
    [[[0], [1]], [[i] for i in range(10)], [[3] * 7], [[0]] * 20_000],
    ids=["two rows", "ten rows", "one sample", "twenty thousand steps"],
)
def test_runs_of_few_rows_or_many_steps(
    tmp_path: Path, order: str, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_up(tmp_path / "run", 11, 2, [np.array(batch) for batch in batches])
    with_order(monkeypatch, order)
    hydra_pipe.reduce(run, method="hydra")
    truth = in_float64(run)
    np.testing.assert_allclose(
        np.asarray(hydra_pipe.open_run(run).relevance("hydra")),
        truth,
        rtol=1e-4,
        atol=1e-5 * np.abs(truth).max(),
    )
    assert hydra_pipe.verify(run) == []
