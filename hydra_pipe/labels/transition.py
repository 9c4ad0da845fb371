"""A model of how wrong labels came about, fitted to the labels as they were given.

    pi_ik ~ q_ik^power exp(bias_k)           chance that k is the true class of sample i
    P(given label y | true class k) = T_ky   transition matrix

q are chances of the classes by views that hardly see the label. The power makes views that are too
shy or too bold as sure as the labels show that they are. The bias undoes that the views were made
from labels of which some classes lost more than others. All of it is fitted by expectation
maximisation to the given labels, without any truth.
"""

from dataclasses import dataclass

import numpy as np

from hydra_pipe.labels.dynamics import blocks_of
from hydra_pipe.types import F64, I64

# Where the fit begins, and where its priors draw it.
_POWER, _NOISE = 2.0, 0.2
# Samples that a prior is worth: those of the power and the bias, and for each class those of a row
# of the transition matrix, times the number of classes.
_WORTH, _WORTH_OF_ROW = 5.0, 6.0
# Least and largest share of wrong labels that the prior of the transition matrix has.
_LEAST_NOISE, _MOST_NOISE = 0.01, 0.6
# Least chance that a label is wrong, shared by the other classes.
_FLOOR = 0.002
_ROUNDS, _CONVERGED = 200, 1e-4
# Samples that the model is fitted to, at most.
MOST_FITTED = 20_000


@dataclass(frozen=True)
class Model:
    """Parameters of the model.

    Attributes:
        power: exponent of the views.
        bias: logarithm of the factor of each class, shape (class,).
        transition: T, the chance that class k is called j, shape (k, j), rows sum to 1.
    """

    power: float
    bias: F64
    transition: F64


def first_model(n_classes: int) -> Model:
    """Return the model that fits begin with: 20 % of the labels wrong, evenly."""
    return Model(_POWER, np.zeros(n_classes), _even(n_classes, _NOISE))


def _even(n_classes: int, noise: float) -> F64:
    found = np.full((n_classes, n_classes), noise / (n_classes - 1))
    np.fill_diagonal(found, 1 - noise)
    return found


def true_chances(model: Model, log_q: F64) -> F64:
    """Return pi, the chances of the true classes before the given label is seen.

    Args:
        model: parameters.
        log_q: logarithms of the views' chances, shape (sample, class).

    Returns:
        Shape (sample, class), rows sum to 1.
    """
    z = model.power * log_q + model.bias
    z = np.exp(z - z.max(axis=1, keepdims=True))
    found: F64 = z / z.sum(axis=1, keepdims=True)
    return found


def joint_chances(model: Model, log_q: F64, labels: I64) -> F64:
    """Return pi_ik T_k,y(i), the chance of each true class and the given label, as `log_q`."""
    return true_chances(model, log_q) * model.transition[:, labels].T


def em_round(model: Model, log_q: F64, labels: I64) -> Model:
    """Return the model after one round of expectation maximisation.

        r_ik ~ pi_ik T_k,y(i);   N_kj = sum over i with label j of r_ik
        eps = clip(1 - tr N / n, 0.01, 0.6);   S: 1 - eps on the diagonal, eps / (K - 1) beside it
        T ~ N + 6 K S by rows, and at least 0.002 / (K - 1)
        power, bias: one Newton step of sum r_ik log pi_ik, less 5/2 times their squared distance
        from where they began

    Args:
        model: parameters before.
        log_q: logarithms of the views' chances, shape (sample, class).
        labels: given labels, shape (sample,).
    """
    k = log_q.shape[1]
    counts, hessian, slope = np.zeros((k, k)), np.zeros((k + 1, k + 1)), np.zeros(k + 1)
    for samples in blocks_of(len(labels), k):
        own, given = log_q[samples], labels[samples]
        pi = true_chances(model, own)
        responsible = pi * model.transition[:, given].T
        responsible /= responsible.sum(axis=1, keepdims=True)
        _add_counts(counts, responsible, given)
        _add_derivatives(hessian, slope, own, pi, responsible)
    power, bias = _newton(model, hessian, slope)
    return Model(power, bias, _next_transition(counts, len(labels)))


def _add_counts(counts: F64, responsible: F64, labels: I64) -> None:
    """Add N_kj of some samples to `counts`, in place."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    counts[:, present] += np.add.reduceat(responsible[order], starts, axis=0).T


def _next_transition(counts: F64, n: int) -> F64:
    k = len(counts)
    noise = float(np.clip(1 - np.trace(counts) / n, _LEAST_NOISE, _MOST_NOISE))
    counts = counts + _WORTH_OF_ROW * k * _even(k, noise)
    found = np.maximum(counts / counts.sum(axis=1, keepdims=True), _FLOOR / (k - 1))
    return np.asarray(found / found.sum(axis=1, keepdims=True))


def _add_derivatives(hessian: F64, slope: F64, log_q: F64, pi: F64, responsible: F64) -> None:
    """Add the second derivatives, with the sign turned, and the first ones of some samples."""
    mean = (pi * log_q).sum(axis=1, keepdims=True)
    apart = pi * (log_q - mean)
    hessian[0, 0] += (apart * log_q).sum()
    sums = apart.sum(axis=0)
    hessian[0, 1:] += sums
    hessian[1:, 0] += sums
    hessian[1:, 1:] += np.diag(pi.sum(axis=0)) - pi.T @ pi
    off = responsible - pi
    slope += np.r_[(off * log_q).sum(), off.sum(axis=0)]


def _newton(model: Model, hessian: F64, slope: F64) -> tuple[float, F64]:
    slope = slope - _WORTH * np.r_[model.power - _POWER, model.bias]
    step = np.linalg.solve(hessian + _WORTH * np.eye(len(slope)), slope)
    step *= min(1.0, 1.0 / max(float(np.abs(step).max()), 1e-12))
    return max(model.power + float(step[0]), 0.0), model.bias + step[1:]


def fitted_samples(n: int) -> I64:
    """Return the samples among `n` that the model is fitted to. The draw is always the same."""
    if n <= MOST_FITTED:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, MOST_FITTED, replace=False))


def fit(log_q: F64, labels: I64) -> Model:
    """Fit the model to given labels.

    Args:
        log_q: logarithms of the views' chances, shape (sample, class).
        labels: given labels, shape (sample,).

    Returns:
        The model after 200 rounds, or when a round changes no parameter by 1e-4.
    """
    model = first_model(log_q.shape[1])
    for _ in range(_ROUNDS):
        before, model = model, em_round(model, log_q, labels)
        if _distance(before, model) < _CONVERGED:
            break
    return model


def _distance(a: Model, b: Model) -> float:
    """Largest change of a parameter."""
    return max(
        abs(a.power - b.power),
        float(np.abs(a.bias - b.bias).max()),
        float(np.abs(a.transition - b.transition).max()),
    )


def halfway(model: Model) -> Model:
    """Return the model with power and bias halfway back to where fits begin.

    Labels are ordered better by it: the bias helps where noise goes one way, and harms a little
    elsewhere.
    """
    return Model((model.power + _POWER) / 2, model.bias / 2, model.transition)


def shares_of_suggested(model: Model, log_q: F64, labels: I64) -> F64:
    """Return the suggested label's share in the chances of all labels but the given one.

    Arguments: as of `log_odds`, which suggests.

    Returns:
        max_(k != y) pi_k T_ky / sum_(k != y) pi_k T_ky, shape (sample,).
    """
    joint = joint_chances(model, log_q, labels)
    joint[np.arange(len(labels)), labels] = 0.0
    found: F64 = joint.max(axis=1) / np.maximum(joint.sum(axis=1), np.finfo(np.float64).tiny)
    return found


def log_odds(model: Model, log_q: F64, labels: I64) -> tuple[F64, I64]:
    """Return how much likelier another class is than the given one, and the likeliest other one.

    Returns:
        s = log sum_(k != y) pi_k T_ky - log pi_y T_yy, shape (sample,); argmax_(k != y) pi_k T_ky,
        int64, shape (sample,).
    """
    joint = joint_chances(model, log_q, labels)
    rows = np.arange(len(labels))
    own = joint[rows, labels].copy()
    joint[rows, labels] = 0.0
    tiny = np.finfo(np.float64).tiny
    others = joint.sum(axis=1)
    return np.log(others + tiny) - np.log(own + tiny), joint.argmax(axis=1).astype(np.int64)
