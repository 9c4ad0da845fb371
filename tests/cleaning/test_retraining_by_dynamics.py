"""Retrainings of a proposal by dynamics: each treatment is what torch trains with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.mislabelled import TESTS, N, small
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hydra_pipe
from hydra_pipe.cleaning.retraining import ALL, RANDOM, TRUE, WRONG
from hydra_pipe.cleaning.treatments import DROPPED, MIXED, RELABELLED, WEIGHTED
from hydra_pipe.training.batches import Samples, epoch_order

GIVEN = small().train.tensors[1].numpy()
HOWS = (DROPPED, RELABELLED, MIXED, WEIGHTED)


def trained(seed: int, weights: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Loss and accuracy on the tests after a plain loop with weights and labels."""
    pipeline = small(seed)
    pipeline.train = TensorDataset(pipeline.train.tensors[0], torch.from_numpy(labels))
    own = torch.from_numpy(weights)
    torch.manual_seed(seed)
    for epoch in range(pipeline.epochs):
        for ids, inputs, targets in Samples(pipeline, "train").batches(
            epoch_order(pipeline, epoch), epoch
        ):
            w = own[ids]
            losses = w * pipeline.loss(pipeline.model(inputs), targets)
            (losses.sum() / (w.sum() if w.any() else 1)).backward()
            pipeline.optimizer.step()
            if pipeline.scheduler is not None:
                pipeline.scheduler.step()
            pipeline.model.zero_grad()
    pipeline.model.eval()
    with torch.no_grad():
        inputs, targets = pipeline.test.tensors
        output = pipeline.model(inputs)
        loss = F.cross_entropy(output, targets)
    return float(loss), float((output.argmax(1) == targets).float().mean())


def test_each_treatment_is_trained_with_new_seeds(run: Path) -> None:
    found = hydra_pipe.clean(run, lowest=10, retrain=True, seeds=2)
    rows = {row["trained on"]: row for row in found.retraining}
    assert list(rows) == [ALL, *(name for how in HOWS for name in (how, RANDOM[how])), WRONG, TRUE]
    drop = found.drop.to_pydict()
    weights, labels = np.ones(N, np.float32), GIVEN.copy()
    weights[drop["train_id"]] = 0
    labels[drop["train_id"]] = drop["suggested_class"]
    chances = np.zeros(N)
    chances[found.judged["train_id"].to_numpy()] = found.judged["chance"].to_numpy()
    ones = np.ones(N, np.float32)
    by_hand = {
        ALL: (ones, GIVEN),
        DROPPED: (weights, GIVEN),
        RELABELLED: (ones, labels),
        WEIGHTED: ((1 - chances).astype(np.float32), GIVEN),
        TRUE: (ones, np.array(small().true_labels)),
    }
    for name, (own, given) in by_hand.items():
        losses, accuracies = zip(*(trained(seed, own, given) for seed in (1, 2)), strict=True)
        assert rows[name]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert rows[name]["accuracy"] == pytest.approx(np.mean(accuracies))
    says = " ".join(found.summary["retraining"]["says"])
    assert "measured on all tests: none has chosen" in says
    assert f"{TESTS} tests, 2 seeds" in says
    assert hydra_pipe.verify(run) == []


def test_targets_that_are_no_classes_are_named_and_the_rest_is_compared(tmp_path: Path) -> None:
    def build() -> hydra_pipe.Pipeline:
        pipeline = small()
        for name in ("train", "test"):
            inputs, targets = getattr(pipeline, name).tensors
            setattr(pipeline, name, TensorDataset(inputs, F.one_hot(targets, 4).float()))
        pipeline.sample_labels = GIVEN.tolist()
        pipeline.true_labels = None
        return pipeline

    hydra_pipe.record(build(), tmp_path / "run")
    found = hydra_pipe.clean(tmp_path / "run", lowest=5, retrain=True, pipeline=build())
    assert [row["trained on"] for row in found.retraining] == [
        ALL, DROPPED, RANDOM[DROPPED], WEIGHTED, RANDOM[WEIGHTED]
    ]  # fmt: skip
    says = found.summary["retraining"]["says"]
    assert says[0].startswith("relabelling is not compared: the target of sample")
    assert any(line.startswith("loss: ") for line in says)
