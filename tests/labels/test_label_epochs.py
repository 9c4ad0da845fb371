"""Statistics of visits, against plain loops, and the weights of epochs."""

from dataclasses import replace
from math import exp, log, sqrt

import numpy as np
import pytest
from support.dynamics import made

from hydra_pipe.errors import DataError
from hydra_pipe.labels.dynamics import Dynamics, TopLogits
from hydra_pipe.labels.epochs import (
    Visits,
    epoch_weights,
    mean_over_visits,
    statistics_of,
    visits_of,
)


def test_statistics_of_visits_are_those_of_plain_loops() -> None:
    dynamics, _ = made(n=20, epochs=3)
    assert isinstance(dynamics.logits, np.ndarray)
    statistics = statistics_of(visits_of(dynamics))
    for i, y in enumerate(dynamics.labels):
        losses, margins, errors, own, hits = [], [], [], [], []
        for z in dynamics.logits[:, i].astype(float):
            total = sum(exp(v) for v in z)
            p = [exp(v) / total for v in z]
            losses.append(-log(p[y]))
            margins.append(z[y] - max(v for k, v in enumerate(z) if k != y))
            errors.append(sqrt(sum((v - (k == y)) ** 2 for k, v in enumerate(p))))
            own.append(p[y])
            hits.append(int(np.argmax(z)) == y)
        assert statistics.mean_loss[i] == pytest.approx(np.mean(losses))
        assert statistics.last_loss[i] == pytest.approx(losses[-1])
        assert statistics.mean_margin[i] == pytest.approx(np.mean(margins))
        assert statistics.mean_error[i] == pytest.approx(np.mean(errors))
        assert statistics.variability[i] == pytest.approx(np.std(own))
        assert statistics.wrong_epochs[i] == hits.count(False)
        assert statistics.first_learnt[i] == (hits.index(True) if True in hits else -1)


def test_a_visit_that_did_not_happen_counts_for_nothing() -> None:
    dynamics, _ = made(n=30, epochs=4)
    assert isinstance(dynamics.logits, np.ndarray)
    logits = dynamics.logits.copy()
    logits[3, 5] = np.nan
    with_gap = statistics_of(visits_of(replace(dynamics, logits=logits)))
    shorter = statistics_of(visits_of(Dynamics(dynamics.labels, dynamics.logits[:3])))
    for name in ("mean_loss", "last_loss", "mean_margin", "variability", "wrong_epochs"):
        assert getattr(with_gap, name)[5] == pytest.approx(getattr(shorter, name)[5]), name


def test_a_sample_without_a_visit_has_no_statistics() -> None:
    dynamics, _ = made(n=30, epochs=4)
    assert isinstance(dynamics.logits, np.ndarray)
    logits = dynamics.logits.copy()
    logits[:, 7] = np.nan
    statistics = statistics_of(visits_of(replace(dynamics, logits=logits)))
    assert np.isnan(statistics.mean_loss[7])
    assert np.isnan(statistics.last_loss[7])
    assert np.isnan(statistics.wrong_epochs[7])
    assert statistics.first_learnt[7] == -1
    assert np.isfinite(np.delete(statistics.mean_loss, 7)).all()


def test_a_mean_without_weight_is_the_plain_mean() -> None:
    values = np.array([[1.0, 2.0], [3.0, np.nan]])
    assert mean_over_visits(values, np.array([0.0, 1.0])).tolist() == [3.0, 2.0]


def visits(hit: list[list[int]]) -> Visits:
    """Visits of which only the hits matter; sample 0 has the lowest loss."""
    hits = np.array(hit, float)
    loss = np.ones_like(hits) * np.arange(hits.shape[1])
    return Visits(loss, loss, loss, hits)


def test_epochs_weigh_by_what_is_learnt_and_not_yet_memorised() -> None:
    # samples 0 and 1 are trusted; 2 and 3 are missed at the turn, and one of them is memorised;
    # hits before the turn are no memory
    found = epoch_weights(
        visits([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]), n_classes=4
    )
    assert found.learnt == pytest.approx([1 / 3, 1 / 3, 1, 1, 1])
    assert found.memorised == pytest.approx([0, 0, 0, 1 / 2, 1])
    raw = np.array([1 / 9, 1 / 9, 1, 1 / 4, 0])
    assert found.weight == pytest.approx(raw / raw.sum())
    raw = np.array([1 / 3**8, 1 / 3**8, 1, 1 / 2**16, 0])
    assert found.unmemorised == pytest.approx(raw / raw.sum())


def test_epochs_that_have_learnt_nothing_count_alike() -> None:
    found = epoch_weights(visits([[0, 0], [0, 0]]), n_classes=2)
    assert found.weight.tolist() == [0.5, 0.5]
    assert found.unmemorised.tolist() == [0.5, 0.5]


def test_kept_logits_give_the_loss_and_margin_of_all_logits() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 50, 100))
    labels = rng.integers(0, 100, 50)
    classes = np.argsort(-logits, axis=2)[:, :, :8]
    top = TopLogits(
        own=np.take_along_axis(logits, labels[None, :, None], 2)[:, :, 0],
        largest=np.take_along_axis(logits, classes, 2),
        classes=classes,
        log_sum=np.log(np.exp(logits).sum(axis=2)),
        n_classes=100,
    )
    kept, whole = visits_of(Dynamics(labels, top)), visits_of(Dynamics(labels, logits))
    assert np.allclose(kept.loss, whole.loss)
    assert np.allclose(kept.margin, whole.margin)
    assert (kept.hit == whole.hit).all()
    assert np.allclose(kept.error, whole.error, atol=0.05)


def test_logits_of_other_shapes_are_refused_with_both() -> None:
    with pytest.raises(DataError, match=r"logits has shape \(2, 5, 3\).* 4 labels"):
        Dynamics(np.zeros(4, np.int64), np.zeros((2, 5, 3)))


def test_labels_outside_of_the_classes_are_refused() -> None:
    with pytest.raises(DataError, match="labels run from 0 to 3, and the logits have 3 classes"):
        Dynamics(np.array([0, 3]), np.zeros((2, 2, 3)))
