"""Weights of the rows of each step, from the optimiser's settings at each step.

Symbols: eta learning rate, mu momentum, tau dampening, lambda weight decay, kappa decoupled decay;
a the adjoint of the parameters, v the adjoint of the momentum buffer, d and g as in the sweep of
docs/architecture.md ("The mathematics").
"""

from dataclasses import dataclass, fields

import numpy as np

from hydra_pipe.errors import ScheduleError
from hydra_pipe.types import F64, Bools


@dataclass(frozen=True)
class Schedule:
    """Settings of momentum SGD at each step, for one or more series of parameters.

    A series is a set of parameters that share all of their history. Every array has shape
    (step, series).

    Args:
        learning_rate: eta, float64.
        momentum: mu, float64.
        dampening: tau, float64.
        weight_decay: lambda, float64.
        decoupled_decay: kappa, float64: the fraction by which the step shrinks the parameters,
            apart from the other settings (AdamW).
        nesterov: True if the step was Nesterov's, bool.
        updated: True if the optimiser changed these parameters, bool. It skips parameters without a
            gradient.
        momentum_started: True if the step created the momentum buffer, bool. PyTorch sets a new
            buffer to the gradient itself.

    Raises:
        ScheduleError: the shapes differ, or a value is not finite.
    """

    learning_rate: F64
    momentum: F64
    dampening: F64
    weight_decay: F64
    decoupled_decay: F64
    nesterov: Bools
    updated: Bools
    momentum_started: Bools

    def __post_init__(self) -> None:
        shape = self.learning_rate.shape
        if len(shape) != 2:
            raise ScheduleError(f"a schedule has shape (step, series), not {shape}")
        for field in fields(self):
            values = getattr(self, field.name)
            if values.shape != shape:
                raise ScheduleError(
                    f"{field.name} has shape {values.shape}, learning_rate has {shape}"
                )
            bad = np.argwhere(~np.isfinite(values))
            if bad.size:
                step, series = bad[0]
                raise ScheduleError(
                    f"{field.name} is {values[step, series]} at step {step}: it must be finite"
                )


def step_weights(schedule: Schedule) -> F64:
    """Return the weight of each step's rows in the Hessian-free relevance.

    docs/architecture.md: the sweep with zero curvature carries g = alpha(t) * h_j for one scalar
    alpha(t). So it runs on scalars. R(i, j) = - sum_t alpha(t) <r(i, t), h_j>.

    Args:
        schedule: the optimiser's settings of each step, shape (step, series).

    Returns:
        alpha, shape (step, series), float64, in units of the learning rate. It is negative for a
        plain descent step, and 0 if the parameters were not updated.
    """
    alpha = np.zeros_like(schedule.learning_rate)
    for series in range(alpha.shape[1]):
        alpha[:, series] = _series_weights(schedule, series)
    return alpha


def _series_weights(schedule: Schedule, series: int) -> list[float]:
    # Plain floats: one NumPy operation a step costs ten times as much, and a run may have a million
    # steps.
    columns = [getattr(schedule, field.name)[:, series].tolist() for field in fields(schedule)]
    alpha = [0.0] * len(columns[0])
    a, v = 1.0, 0.0
    for t in range(len(alpha) - 1, -1, -1):
        eta, mu, tau, decay, shrink, nesterov, updated, started = (column[t] for column in columns)
        if not updated:
            continue
        d = -eta * a
        if mu == 0.0:
            # a step without momentum neither reads nor writes the buffer: v passes through it
            g = d
        else:
            gain = 1.0 if started else 1.0 - tau
            v = v + (mu * d if nesterov else d)
            g = gain * v + (d if nesterov else 0.0)
            v = 0.0 if started else mu * v
        a = (1.0 - shrink) * a + decay * g
        alpha[t] = g
    return alpha
