"""The whole way, record to relevance, against oracles."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import in_float64
from support.compare import relative_error
from support.pipelines import conv_pipeline, images
from support.truth import oracle_relevance, read_relevance
from torch import nn
from torch.utils.data import TensorDataset

import hydra_pipe
from hydra_pipe import Pipeline
from hydra_pipe.training.batches import epoch_order


def test_relevance_equals_the_float64_loop_with_everything_sgd_has(
    recorded: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(recorded(encoding="exact", dtype="float32"), tmp_path / "run")
    hydra_pipe.reduce(tmp_path / "run", method="hydra")
    truth = oracle_relevance(conv_pipeline())
    assert relative_error(read_relevance(tmp_path / "run"), truth) < 1e-4


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 2e-3), ("int8", 3e-2)])
def test_smaller_dtypes_lose_only_their_rounding(tmp_path: Path, dtype: str, limit: float) -> None:
    hydra_pipe.record(conv_pipeline(), tmp_path / "run", encoding="exact", dtype=dtype)
    hydra_pipe.reduce(tmp_path / "run", method="hydra")
    assert (
        relative_error(read_relevance(tmp_path / "run"), oracle_relevance(conv_pipeline())) < limit
    )


def test_int8_needs_no_random_rounding(tmp_path: Path) -> None:
    """Rounding to nearest is not unbiased: what is small in its row is lost each time. On real rows
    that shrinks no relevance.
    """
    hydra_pipe.record(
        conv_pipeline(epochs=10), tmp_path / "run", encoding="projected", dim=2000, dtype="float32"
    )
    store = hydra_pipe.open_run(tmp_path / "run").gradients
    assert all(block.encoding == "dense" for block in store.layout.blocks)
    whole = slice(0, store.layout.n_features)
    rows = store.rows.features(slice(0, store.rows.n_rows), whole).astype(np.float64)
    tests = store.test_rows(store.test_steps()[-1]).features(slice(0, 7), whole).astype(np.float64)
    samples = store.samples(slice(0, len(rows)))

    def relevance(nearest: bool, seed: int = 0) -> np.ndarray:
        rounded = np.empty_like(rows)
        for block in store.layout.blocks:
            columns = slice(*block.columns)
            step = np.maximum(np.abs(rows[:, columns]).max(axis=1, keepdims=True) / 127, 1e-300)
            up = 0.5 if nearest else np.random.default_rng(seed).random(rows[:, columns].shape)
            rounded[:, columns] = np.floor(rows[:, columns] / step + up) * step
        total = np.zeros((26, 7))
        np.add.at(total, samples, rounded @ tests.T)
        return total

    truth = np.zeros((26, 7))
    np.add.at(truth, samples, rows @ tests.T)
    found = relevance(nearest=True)
    assert (found * truth).sum() / (truth * truth).sum() == pytest.approx(1.0, abs=2e-3)
    at_random = [relative_error(relevance(nearest=False, seed=s), truth) for s in range(20)]
    assert relative_error(found, truth) < np.mean(at_random)


def linear_loss_pipeline(epochs: int = 3) -> Pipeline:
    """A loss that is linear in the parameters: then the first order is all there is."""
    torch.manual_seed(3)
    model = nn.Linear(5, 2)
    generator = torch.Generator().manual_seed(4)

    def dataset(n: int) -> TensorDataset:
        return TensorDataset(
            torch.randn(n, 5, generator=generator), torch.randn(n, 2, generator=generator)
        )

    return Pipeline(
        model=model,
        optimizer=torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.1
        ),
        loss=lambda output, target: (output * target).sum(1),
        train=dataset(12),
        test=dataset(4),
        batch_size=5,
        epochs=epochs,
    )


def test_relevance_is_true_leave_one_out_where_the_loss_is_linear(tmp_path: Path) -> None:
    pipeline = linear_loss_pipeline()
    hydra_pipe.record(pipeline, tmp_path / "run", encoding="exact", dtype="float32")
    hydra_pipe.reduce(tmp_path / "run", method="hydra")

    def final_losses(without: int | None) -> np.ndarray:
        new = linear_loss_pipeline()
        model = in_float64(new.model)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.1
        )
        inputs, targets = (t.double() for t in new.train.tensors)
        for epoch in range(new.epochs):
            for ids in epoch_order(new, epoch):
                weight = torch.tensor(
                    [0.0 if i == without else 1.0 for i in ids], dtype=torch.float64
                )
                optimizer.zero_grad()
                # "without" is weight 0 in its batches: the batch stays as large as it was
                (weight * new.loss(model(inputs[ids]), targets[ids])).mean().backward()
                optimizer.step()
        inputs, targets = (t.double() for t in new.test.tensors)
        return new.loss(model(inputs), targets).detach().numpy()

    with_all = final_losses(None)
    truth = np.stack([final_losses(i) - with_all for i in range(12)])
    assert relative_error(read_relevance(tmp_path / "run"), truth) < 1e-4


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 200),
    features=st.integers(1, 500),
    memory=st.sampled_from(["200MiB", "250MiB", "4GiB"]),
    scheduler=st.sampled_from(["threads", "synchronous"]),
)
def test_relevance_is_independent_of_chunks_memory_and_scheduler(
    recorded, monkeypatch: pytest.MonkeyPatch, rows: int, features: int, memory: str, scheduler: str
) -> None:
    run = small_chunks_run(recorded, monkeypatch)
    monkeypatch.setattr(
        "hydra_pipe.reduction.executors.local.resident_bytes", lambda: 0
    )  # of pytest and all that other tests loaded
    hydra_pipe.reduce(
        run,
        chunks=f"{rows}x{features}",
        memory=memory,
        scheduler=scheduler,
        overwrite=True,
        method="hydra",
    )
    changed = read_relevance(run)
    hydra_pipe.reduce(run, overwrite=True, method="hydra")
    assert relative_error(changed, read_relevance(run)) < 1e-6


_SMALL: dict[str, Path] = {}


def small_chunks_run(recorded, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in many chunks and several shards, so that there is something to go wrong."""
    if "run" not in _SMALL:
        import hydra_pipe.plan.chunking as geometry

        with monkeypatch.context() as patch:
            patch.setattr(geometry, "CHUNK_FEATURES", 100)
            patch.setattr(geometry, "SHARD_BYTES", 16 * 400 * 2)
            patch.setattr(geometry, "CHUNK_BYTES", 4 * 100 * 2)
            run = recorded(encoding="exact", dtype="float16", dim=1)
        _SMALL["run"] = run
    return _SMALL["run"]


def test_permuting_the_samples_permutes_the_rows_of_relevance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images(26, 1)
    order = np.random.default_rng(0).permutation(26)
    hydra_pipe.record(conv_pipeline(), tmp_path / "a", encoding="exact", dtype="float32")
    shuffled = TensorDataset(*(t[order] for t in data.tensors))
    place = np.argsort(order)
    real_order = epoch_order

    def same_samples(pipeline: Pipeline, epoch: int) -> list[np.ndarray]:
        return [place[ids] for ids in real_order(pipeline, epoch)]

    monkeypatch.setattr("hydra_pipe.training.trainer.epoch_order", same_samples)
    hydra_pipe.record(
        conv_pipeline(train=shuffled), tmp_path / "b", encoding="exact", dtype="float32"
    )
    for run in ("a", "b"):
        hydra_pipe.reduce(tmp_path / run, method="hydra")
    np.testing.assert_array_equal(
        read_relevance(tmp_path / "b"), read_relevance(tmp_path / "a")[order]
    )
