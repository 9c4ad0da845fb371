"""The model of wrong labels: one round against plain loops, and what a fit recovers."""

from math import exp, log

import numpy as np
import pytest

from hydra_pipe.labels import dynamics, transition
from hydra_pipe.labels.transition import (
    Model,
    em_round,
    first_model,
    fit,
    fitted_samples,
    halfway,
    joint_chances,
    log_odds,
    true_chances,
)
from hydra_pipe.types import F64, I64


def case(n: int = 25, classes: int = 3) -> tuple[F64, I64, Model]:
    rng = np.random.default_rng(3)
    log_q = np.log(rng.dirichlet(np.ones(classes), n))
    transition = rng.dirichlet(np.ones(classes), classes) + 2 * np.eye(classes)
    model = Model(1.3, rng.normal(0, 0.5, classes), transition / 3)
    return log_q, rng.integers(0, classes, n), model


def responsibilities(log_q: F64, labels: I64, model: Model) -> list[list[float]]:
    rows = []
    for z, y in zip(log_q, labels, strict=True):
        pi = [exp(model.power * v + b) for v, b in zip(z, model.bias, strict=True)]
        joint = [v / sum(pi) * model.transition[k, y] for k, v in enumerate(pi)]
        rows.append([v / sum(joint) for v in joint])
    return rows


def test_the_next_matrix_is_that_of_counts_by_hand() -> None:
    log_q, labels, model = case()
    rows = responsibilities(log_q, labels, model)
    counts = [[0.0] * 3 for _ in range(3)]
    for r, y in zip(rows, labels, strict=True):
        for k in range(3):
            counts[k][y] += r[k]
    noise = 1 - sum(counts[k][k] for k in range(3)) / len(labels)
    assert 0.01 < noise < 0.6
    expected = []
    for k in range(3):
        row = [counts[k][j] + 6 * 3 * ((1 - noise) if j == k else noise / 2) for j in range(3)]
        expected.append([v / sum(row) for v in row])
    assert np.allclose(em_round(model, log_q, labels).transition, expected)


def objective(power: float, bias: F64, log_q: F64, rows: list[list[float]]) -> float:
    """The sum that a Newton step climbs, by loops."""
    total = -2.5 * ((power - 2) ** 2 + sum(float(b) ** 2 for b in bias))
    for z, r in zip(log_q, rows, strict=True):
        terms = [power * v + b for v, b in zip(z, bias, strict=True)]
        norm = log(sum(exp(t) for t in terms))
        total += sum(own * (t - norm) for own, t in zip(r, terms, strict=True))
    return total


def test_power_and_bias_move_by_a_newton_step() -> None:
    log_q, labels, model = case()
    model = Model(1.9, model.bias / 5, model.transition)
    rows = responsibilities(log_q, labels, model)
    at = np.r_[model.power, model.bias]

    def f(x: F64) -> float:
        return objective(x[0], x[1:], log_q, rows)

    h = 1e-4
    steps = h * np.eye(4)
    slope = np.array([(f(at + e) - f(at - e)) / (2 * h) for e in steps])
    hessian = np.array(
        [
            [
                (f(at + a + b) - f(at + a - b) - f(at - a + b) + f(at - a - b)) / (4 * h * h)
                for b in steps
            ]
            for a in steps
        ]
    )
    expected = at - np.linalg.solve(hessian, slope)
    assert np.abs(expected - at).max() < 1
    found = em_round(model, log_q, labels)
    assert np.allclose(np.r_[found.power, found.bias], expected, atol=1e-4)


def test_rounds_never_lower_the_penalised_likelihood() -> None:
    """Without the priors of the matrix, which change from round to round."""
    rng = np.random.default_rng(5)
    log_q, labels = np.log(rng.dirichlet(np.full(4, 0.3), 2000)), rng.integers(0, 4, 2000)
    labels = np.where(rng.random(2000) < 0.7, log_q.argmax(axis=1), labels)
    model, last = first_model(4), -np.inf
    for _ in range(10):
        model = em_round(model, log_q, labels)
        penalty = 2.5 * ((model.power - 2) ** 2 + (model.bias**2).sum())
        value = float(np.log(joint_chances(model, log_q, labels).sum(axis=1)).sum() - penalty)
        assert value > last - 1.0
        last = value


def simulated(n: int, transition: F64, power: float) -> tuple[F64, I64, I64]:
    """Views that are too shy by `power`, true classes, and labels by `transition`."""
    rng = np.random.default_rng(7)
    k = len(transition)
    pi = rng.dirichlet(np.full(k, 0.2), n).clip(1e-9)
    pi /= pi.sum(axis=1, keepdims=True)
    truth = np.array([rng.choice(k, p=p) for p in pi])
    labels = np.array([rng.choice(k, p=transition[t]) for t in truth])
    q = pi ** (1 / power)
    return np.log(q / q.sum(axis=1, keepdims=True)), truth, labels


def test_a_fit_finds_power_and_matrix_that_made_the_labels() -> None:
    made = np.array([[0.9, 0.05, 0.05], [0.02, 0.68, 0.3], [0.05, 0.05, 0.9]])
    log_q, _, labels = simulated(4000, made, power=2.5)
    found = fit(log_q, labels)
    assert np.allclose(found.transition, made, atol=0.06)
    assert found.power == pytest.approx(2.5, abs=0.4)


def test_a_fit_finds_noise_that_goes_one_way_in_the_rarer_class() -> None:
    made = np.array([[1.0, 0.0], [0.3, 0.7]])
    log_q, truth, labels = simulated(6000, made, power=1.0)
    found = fit(log_q, labels)
    assert found.transition[0, 1] < 0.03
    assert 0.2 < found.transition[1, 0] < 0.4
    score, _ = log_odds(found, log_q, labels)
    assert (labels[score > 0] == 0).all()
    assert (truth != labels)[score > 0].mean() > 0.7


def test_odds_and_suggestion_are_those_of_the_joint_chances() -> None:
    log_q, labels, model = case()
    joint = true_chances(model, log_q) * model.transition[:, labels].T
    score, suggested = log_odds(model, log_q, labels)
    for i, y in enumerate(labels):
        others = {k: joint[i, k] for k in range(3) if k != y}
        assert score[i] == pytest.approx(log(sum(others.values()) / joint[i, y]))
        assert suggested[i] == max(others, key=others.__getitem__)


def test_halfway_lies_between_a_model_and_the_first_one() -> None:
    _, _, model = case()
    found = halfway(model)
    assert found.power == pytest.approx((model.power + 2) / 2)
    assert np.allclose(found.bias, model.bias / 2)
    assert (found.transition == model.transition).all()


def test_more_samples_than_the_fit_takes_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transition, "MOST_FITTED", 1500)
    assert (fitted_samples(1500) == np.arange(1500)).all()
    drawn = fitted_samples(3000)
    assert len(np.unique(drawn)) == 1500
    assert (np.diff(drawn) > 0).all()
    assert 1400 < drawn.mean() < 1600


def test_blocks_of_samples_give_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    log_q, labels, model = case()
    whole = em_round(model, log_q, labels)
    monkeypatch.setattr(dynamics, "CHANCES_AT_ONCE", 12)
    found = em_round(model, log_q, labels)
    assert found.power == pytest.approx(whole.power)
    assert np.allclose(found.bias, whole.bias)
    assert np.allclose(found.transition, whole.transition)


@pytest.mark.parametrize("classes", [2, 5])
def test_labels_that_are_all_the_same_give_finite_parameters(classes: int) -> None:
    log_q = np.log(np.random.default_rng(0).dirichlet(np.ones(classes), 50))
    model = fit(log_q, np.zeros(50, np.int64))
    assert np.isfinite(model.transition).all()
    assert np.isfinite(model.bias).all()
