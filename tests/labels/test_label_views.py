"""Predictions, ridge and votes, against fits without the sample and against brute force."""

import numpy as np
import pytest

from hydra_pipe.labels import dynamics as dynamics_module
from hydra_pipe.labels import views
from hydra_pipe.labels.dynamics import Dynamics
from hydra_pipe.labels.views import (
    PENALTIES,
    Ridge,
    RidgeSideBySide,
    Voters,
    VotesOver,
    chosen_voters,
    heaviest,
    predictions,
)
from hydra_pipe.types import F64, I64


def clouds(n: int = 40, features: int = 5, classes: int = 3) -> tuple[np.ndarray, I64]:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, classes, n)
    centres = rng.normal(0, 1, (classes, features))
    return (centres[labels] + rng.normal(0, 1, (n, features))).astype(np.float32), labels


def ridge(inputs: np.ndarray, labels: I64, classes: int) -> F64:
    return Ridge(inputs, labels, classes).left_out()


def votes(inputs: np.ndarray, labels: I64, classes: int, voters: I64) -> F64:
    return Voters(inputs, labels, classes, voters).votes(inputs, np.arange(len(inputs)))


def ridge_side_by_side(dynamics: Dynamics, weights: F64) -> F64:
    return RidgeSideBySide(dynamics, weights).chances()


def votes_over(dynamics: Dynamics, weightings: list[F64]) -> list[F64]:
    return VotesOver(dynamics, weightings).chances()


def refitted(inputs: np.ndarray, labels: I64, classes: int, penalty: float) -> F64:
    """Ridge by solving the normal equations again without each sample."""
    x = inputs.astype(float)
    x = np.column_stack([(x - x.mean(axis=0)) / x.std(axis=0), np.ones(len(x))])
    y = np.eye(classes)[labels]
    rows = []
    for i in range(len(x)):
        a, b = np.delete(x, i, axis=0), np.delete(y, i, axis=0)
        rows.append(x[i] @ np.linalg.solve(a.T @ a + penalty * np.eye(x.shape[1]), a.T @ b))
    return np.array(rows)


def test_ridge_predicts_each_sample_from_a_fit_without_it() -> None:
    inputs, labels = clouds()
    fits = [refitted(inputs, labels, 3, penalty) for penalty in PENALTIES]
    errors = [((fit - np.eye(3)[labels]) ** 2).sum() for fit in fits]
    assert np.allclose(ridge(inputs, labels, 3), fits[int(np.argmin(errors))], atol=1e-6)


def test_a_feature_that_never_changes_has_no_part_in_the_ridge() -> None:
    inputs, labels = clouds()
    more = np.column_stack([inputs, np.full(len(inputs), 7.0, np.float32)])
    assert np.allclose(ridge(more, labels, 3), ridge(inputs, labels, 3), atol=1e-9)


def voted(inputs: np.ndarray, labels: I64, classes: int, voters: I64, k: int) -> F64:
    """Votes by a sort of all similarities."""
    found = np.zeros((len(inputs), classes))
    for i, a in enumerate(inputs.astype(float)):
        similar = [
            (a @ b / np.linalg.norm(a) / np.linalg.norm(b), labels[j])
            for j, b in zip(voters, inputs[voters].astype(float), strict=True)
            if j != i
        ]
        for cosine, label in sorted(similar, reverse=True)[:k]:
            found[i, label] += max(cosine, 0)
    return found / found.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_votes_are_those_of_a_full_sort(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_BLOCK", block)
    monkeypatch.setattr(views, "NEIGHBOURS", 7)
    inputs, labels = clouds()
    for voters in (np.arange(40), np.arange(0, 40, 3)):
        found = votes(inputs, labels, 3, voters)
        assert np.allclose(found, voted(inputs, labels, 3, voters, 7), atol=1e-5)


def test_a_sample_does_not_vote_on_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "NEIGHBOURS", 1)
    inputs = np.array([[1, 0], [1, 0.01], [0, 1], [0.01, 1]], np.float32)
    found = votes(inputs, np.array([0, 1, 2, 2]), 3, np.arange(4))
    assert found.argmax(axis=1).tolist() == [1, 0, 2, 2]


@pytest.mark.parametrize(("classes", "most"), [(2, 10_000), (200, 20_000), (1000, 30_000)])
def test_no_more_samples_vote_than_are_allowed(classes: int, most: int) -> None:
    assert (chosen_voters(most, classes) == np.arange(most)).all()
    voters = chosen_voters(3 * most, classes)
    assert len(np.unique(voters)) == most
    assert (np.diff(voters) > 0).all()


def test_predictions_are_the_weighted_mean_of_the_visits_that_happened() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1, (3, 5, 4))
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    logits[1, 2], logits[:, 3] = np.nan, np.nan
    weights = np.array([0.2, 0.5, 0.3])
    found = predictions(Dynamics(np.zeros(5, np.int64), logits), weights)
    assert np.allclose(found[0], weights @ p[:, 0])
    assert np.allclose(found[2], (0.2 * p[0, 2] + 0.3 * p[2, 2]) / 0.5)
    assert np.allclose(found[3], 1 / 4)


def test_the_heaviest_epochs_keep_their_weights_and_others_have_none() -> None:
    weights = np.array([0.1, 0.0, 0.5, 0.4])
    assert heaviest(weights, 2).tolist() == [0.0, 0.0, 0.5, 0.4]
    assert heaviest(weights, 9).tolist() == weights.tolist()


def test_inputs_of_chosen_epochs_stand_side_by_side() -> None:
    inputs, labels = clouds()
    other = np.random.default_rng(4).normal(0, 1, inputs.shape).astype(np.float32)
    dynamics = Dynamics(labels, np.zeros((3, 40, 3)), np.stack([inputs, 9 * other, other]))
    found = ridge_side_by_side(dynamics, np.array([0.3, 0.0, 0.7]))
    expected = views.normalised(ridge(np.column_stack([inputs, other]), labels, 3))
    assert np.allclose(found, expected)


def test_an_epoch_without_a_visit_says_the_mean_of_its_inputs() -> None:
    inputs, labels = clouds()
    with_gap, filled = np.stack([inputs, inputs + 1]), np.stack([inputs, inputs + 1])
    with_gap[1, 4] = np.nan
    filled[1, 4] = np.delete(inputs + 1, 4, axis=0).mean(axis=0)
    weights = np.array([0.5, 0.5])
    a, b = (
        ridge_side_by_side(Dynamics(labels, np.zeros((2, 40, 3)), x), weights)
        for x in (with_gap, filled)
    )
    assert np.allclose(a, b, atol=1e-6)


def test_votes_are_averaged_over_the_epochs_that_visited_a_sample() -> None:
    inputs, labels = clouds()
    stacked = np.stack([inputs, inputs[::-1], inputs**2])
    stacked[1, 4] = np.nan
    dynamics = Dynamics(labels, np.zeros((3, 40, 3)), stacked)
    weights = np.array([0.25, 0.75, 0.0])
    there = np.delete(np.arange(40), 4)
    one = votes(stacked[0], labels, 3, np.arange(40))
    two = votes(stacked[1, there], labels[there], 3, np.arange(39))
    (found, of_first) = votes_over(dynamics, [weights, np.array([1.0, 0.0, 0.0])])
    assert np.allclose(found[there], views.normalised(0.25 * one[there] + 0.75 * two))
    assert np.allclose(found[4], views.normalised(one[4:5])[0])
    assert np.allclose(of_first, views.normalised(one))


def test_a_sample_without_inputs_has_even_chances() -> None:
    inputs, labels = clouds()
    inputs = np.stack([inputs, inputs])
    inputs[:, 4] = np.nan
    dynamics = Dynamics(labels, np.zeros((2, 40, 3)), inputs)
    weights = np.array([0.5, 0.5])
    for view in (ridge_side_by_side(dynamics, weights), *votes_over(dynamics, [weights])):
        assert np.allclose(view[4], 1 / 3)
        assert np.isfinite(view).all()


def test_some_samples_have_the_chances_that_they_have_among_all() -> None:
    inputs, labels = clouds()
    stacked = np.stack([inputs, inputs[::-1], inputs**2])
    stacked[1, 4], stacked[:, 7] = np.nan, np.nan
    dynamics = Dynamics(labels, np.random.default_rng(0).normal(0, 1, (3, 40, 3)), stacked)
    weights = np.array([0.25, 0.75, 0.0])
    ridges, over = RidgeSideBySide(dynamics, weights), VotesOver(dynamics, [weights])
    for some in (slice(3, 17), np.array([1, 4, 7, 8, 39])):
        assert np.allclose(ridges.chances(some), ridges.chances()[some])
        assert np.allclose(over.chances(some)[0], over.chances()[0][some])
        chosen = predictions(dynamics, weights, some)
        assert np.allclose(chosen, predictions(dynamics, weights)[some])


def test_blocks_of_samples_give_the_same_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, labels = clouds()
    whole = ridge(inputs, labels, 3)
    monkeypatch.setattr(dynamics_module, "CHANCES_AT_ONCE", 20)
    assert np.allclose(ridge(inputs, labels, 3), whole, atol=1e-12)
