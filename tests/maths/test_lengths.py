"""The length of a step, and the bound beyond which it rings, against the update itself."""

import numpy as np
import pytest

from hydra_pipe.maths.fisher import saturation
from hydra_pipe.maths.influence import inverse_damping
from hydra_pipe.maths.schedule import Schedule

ETA = 0.3
SETTINGS = [
    (momentum, dampening, nesterov)
    for momentum in (0.0, 0.4, 0.8)
    for dampening in (0.0, 0.3, momentum)
    for nesterov in (False, True)
]


def moves(momentum: float, dampening: float, *, nesterov: bool, n: int = 400) -> np.ndarray:
    """The moves of `n` steps, of which the first alone has a gradient, of 1."""
    found, buffer = [], 0.0
    for t in range(n):
        gradient = float(t == 0)
        buffer = momentum * buffer + (1 - dampening) * gradient
        used = gradient + momentum * buffer if nesterov else buffer
        found.append(ETA * (used if momentum else gradient))
    return np.array(found)


@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), SETTINGS)
def test_lengths_are_the_sum_of_all_moves_that_a_gradient_makes(
    momentum: float, dampening: float, nesterov: bool
) -> None:
    length = moves(momentum, dampening, nesterov=nesterov).sum()
    kappa = saturation(ETA, momentum, dampening, nesterov=nesterov, factor=50.0)
    assert kappa == pytest.approx(50 * length)
    schedule = Schedule(
        learning_rate=np.array([[ETA]]),
        momentum=np.array([[momentum]]),
        dampening=np.array([[dampening]]),
        weight_decay=np.zeros((1, 1)),
        decoupled_decay=np.zeros((1, 1)),
        nesterov=np.array([[nesterov]]),
        updated=np.ones((1, 1), bool),
        momentum_started=np.zeros((1, 1), bool),
    )
    assert inverse_damping(schedule) == pytest.approx([length])


@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), SETTINGS)
def test_the_largest_curvature_is_the_one_from_which_on_steps_ring(
    momentum: float, dampening: float, nesterov: bool
) -> None:
    """A parameter x under the curvature k: the gradient is k x. At the bound the map of (x, buffer)
    has the eigenvalue -1.
    """
    k = 1 / saturation(ETA, momentum, dampening, nesterov=nesterov, factor=0.0)
    columns = []
    for x, buffer in ((1.0, 0.0), (0.0, 1.0)):
        after = momentum * buffer + (1 - dampening) * k * x
        used = k * x + momentum * after if nesterov else after
        columns.append((x - ETA * (used if momentum else k * x), after))
    values = np.linalg.eigvals(np.array(columns).T)
    assert np.abs(values + 1).min() < 1e-9
    assert np.abs(values).max() < 1 + 1e-9
