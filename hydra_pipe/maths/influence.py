"""Influence of training samples at the end of training: the damped inverse of the empirical Fisher.

Symbols: g_i the gradient of training sample i, the row i of G; h_j the gradient of test sample j;
N samples; d_i = rho_i / N with rho_i the sample's curvature weight; F = sum_i d_i g_i g_i.T =
G.T D G; Lambda the damping, a diagonal matrix.

    R = 1/N G (F + Lambda)^-1 H.T      (sample, test)

In the space of samples, with A = G Lambda^-1 G.T, the same is 1/N (A D + I)^-1 G Lambda^-1 H.T,
because (A D + I) G Lambda^-1 = G Lambda^-1 (F + Lambda) Lambda^-1.

Training that ends is damped. Let the lengths of its steps sum to s. Descent along a direction of
curvature k has then gone 1 - exp(-k s) of its way to the optimum, which is about k / (k + 1/s).
So Lambda is 1/s, plus weight decay, which is curvature.
"""

import numpy as np

from hydra_pipe.maths.schedule import Schedule
from hydra_pipe.types import F64

# Factor on the damping that the lengths of the steps give.
DAMPING = 1.0


def inverse_damping(schedule: Schedule) -> F64:
    """Return 1 / Lambda = s / (1 + decay).

    s is the sum over steps of eta (1 - tau) / (1 - mu), or of Nesterov's eta (1 - mu tau) /
    (1 - mu). decay is the same sum with each term times
    lambda.

    Args:
        schedule: the optimiser's settings of each step, shape (step, series).

    Returns:
        Shape (series,), in units of the learning rate. 0 for a series that was never updated.
    """
    # Momentum of 1 never forgets, so its length is infinite. The length after a hundred steps is
    # as good as any.
    gain = np.where(
        schedule.momentum > 0,
        (1.0 - schedule.dampening * np.where(schedule.nesterov, schedule.momentum, 1.0))
        / np.maximum(1.0 - schedule.momentum, 0.01),
        1.0,
    )
    length = schedule.learning_rate * gain * schedule.updated
    decay = length * schedule.weight_decay + schedule.decoupled_decay * schedule.updated
    inverse: F64 = length.sum(axis=0) / (DAMPING + decay.sum(axis=0))
    return inverse


def damped(matrix: F64) -> F64:
    """Add I to `matrix` in place, and return `matrix`."""
    np.einsum("ii->i", matrix)[:] += 1.0
    return matrix
