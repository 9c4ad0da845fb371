"""The curvature of a step from its rows alone: the empirical Fisher, saturated (docs/architecture.md, "The mathematics").

C = W.T W with W the rows r(i, t) times sqrt(n rho_i), n samples in the batch and rho_i the curvature weight of the sample. A batch
whose C is too large for its learning rate would make the sweep ring and blow up: in its place stands C (I + K C)^-1, with K a
diagonal matrix, which is W.T (I + W K W.T)^-1 W. Its eigenvalues are below 1 / K.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# f of kappa = f * eta / (1 - mu)
SATURATION = 0.3


def saturation(learning_rate: float, momentum: float, dampening: float, *, nesterov: bool, factor: float = SATURATION) -> float:
    """kappa of a step: f times the length that it goes along a constant gradient, eta (1 - tau) / (1 - mu).

    It is never so small that a step could ring: heavy ball is stable where eta (1 - tau) times the curvature is below
    2 (1 + mu), Nesterov's form where it is below 2 (1 + mu) / (1 + 2 mu), and the curvature is at most 1 / kappa.

    Args:
        learning_rate, momentum, dampening, nesterov: of the step; momentum below 1.
        factor: f.

    Returns:
        kappa, in units of the learning rate.
    """
    step = learning_rate * (1.0 - dampening) if momentum else learning_rate
    stable = step * ((1.0 + 2.0 * momentum) if nesterov else 1.0) / (2.0 * (1.0 + momentum))
    # momentum of 1 never forgets: what it has gone along after a hundred steps is as good as any
    return max(factor * step / max(1.0 - momentum, 0.01), stable)


def saturated(gram: Floats, scores: Floats) -> tuple[Floats, float]:
    """(I + G)^-1 S, by which C (I + K C)^-1 g is W.T times that.

    Args:
        gram: G = W K W.T, shape (row, row), float64.
        scores: S = W g, shape (row, test), float64.

    Returns:
        The product, shape (row, test), and the share of the curvature that is left, tr((I + G)^-1 G) / tr(G); 1 where
        there is none.
    """
    inverse = np.linalg.inv(np.eye(len(gram)) + gram)
    whole = float(np.trace(gram))
    left = (len(gram) - float(np.trace(inverse))) / whole if whole > 0 else 1.0
    return inverse @ scores, left
