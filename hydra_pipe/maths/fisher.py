"""Curvature of a step from its rows alone: the empirical Fisher, saturated.

See docs/architecture.md, "The mathematics". C = W.T W. W has the rows r(i, t) times sqrt(n w_i),
with n samples in the batch and w_i the bounded curvature weight rho_i of the sample. If C is too
large for the learning rate of its batch, the sweep rings and blows up. So C (I + K C)^-1 takes
its place, with K a diagonal matrix. It equals W.T (I + W K W.T)^-1 W. Its eigenvalues are below
1 / K.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.types import F64


@dataclass(frozen=True)
class Form:
    """One way to take the curvature of a step.

    Args:
        factor: f of kappa = f * eta / (1 - mu).
        least, most: bounds of a row's weight, which is its rho in between.
        share: weight of this form's relevance in the mean.
    """

    factor: float
    least: float
    most: float
    share: float

    def weight(self, rho: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the weight of each row."""
        return np.clip(rho, np.float32(self.least), np.float32(self.most))


# Curvature from above, little and more saturated, and from below, much saturated. Each form has
# a sweep of its own. The relevance is the mean of the forms, because their errors differ
# (docs/methods.md). Shares add up to 1.
FORMS = (Form(0.1, 1.0, np.inf, 0.4), Form(0.3, 1.0, np.inf, 0.4), Form(1.0, 0.0, 1.0, 0.2))


def saturation(
    learning_rate: float, momentum: float, dampening: float, *, nesterov: bool, factor: float
) -> float:
    """Return kappa of a step.

    kappa is f times the length that the step goes along a constant gradient: eta (1 - tau) /
    (1 - mu), in Nesterov's form eta (1 - mu tau) / (1 - mu). It is never so small that a step could
    ring. Heavy ball is stable if eta (1 - tau) times the curvature is below 2 (1 + mu). Nesterov's
    form is stable if eta (1 + mu + mu (1 - tau)) times the curvature is. The curvature is at most
    1 / kappa.

    Args:
        learning_rate, momentum, dampening, nesterov: settings of the step; momentum below 1.
        factor: f.

    Returns:
        kappa, in units of the learning rate.
    """
    gain = 1.0 - dampening if momentum else 1.0
    times = 1.0 + momentum + momentum * gain if nesterov else gain
    stable = learning_rate * times / (2.0 * (1.0 + momentum))
    # Momentum of 1 never forgets, so its length is infinite. The length after a hundred steps is
    # as good as any.
    length = 1.0 - momentum * dampening if nesterov else gain
    return max(factor * learning_rate * length / max(1.0 - momentum, 0.01), stable)


def saturated(gram: F64, scores: F64) -> tuple[F64, float]:
    """Return (I + G)^-1 S. W.T times this product is C (I + K C)^-1 g.

    Args:
        gram: G = W K W.T, shape (row, row), float64.
        scores: S = W g, shape (row, test), float64.

    Returns:
        The product, shape (row, test), and the share of the curvature that is left,
        tr((I + G)^-1 G) / tr(G). The share is 1 if there is no curvature.
    """
    inverse = np.linalg.inv(np.eye(len(gram)) + gram)
    whole = float(np.trace(gram))
    left = (len(gram) - float(np.trace(inverse))) / whole if whole > 0 else 1.0
    return inverse @ scores, left
