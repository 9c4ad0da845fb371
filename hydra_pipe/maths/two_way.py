"""Two-way analysis of variance: what repeated trainings on the same subsets differ by."""

import numpy as np
from numpy.typing import NDArray


def residual_variance(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the variance that neither the subset nor the seed alone explains, without bias.

    The model is values = mean + effect of the subset + effect of the seed + noise. With S seeds
    and n subsets the residuals have (S - 1)(n - 1) degrees of freedom.

    Args:
        values: one value for each seed, subset and test, shape (seed, subset, test). There are two
            or more seeds and subsets.

    Returns:
        Shape (test,).
    """
    wide = values.astype(np.float64)
    residual = wide - wide.mean(axis=1, keepdims=True) - wide.mean(axis=0, keepdims=True)
    residual += wide.mean(axis=(0, 1))
    n_free = (wide.shape[0] - 1) * (wide.shape[1] - 1)
    return np.asarray((residual**2).sum(axis=(0, 1)) / n_free)


def share_of_variance(
    noise: NDArray[np.floating], values: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return the share that noise has in the variance of `values`, at most 1.

    It is 0 if all values of a test are equal.

    Args:
        noise: variance of the noise in `values`, shape (test,).
        values: values, shape (subset, test).

    Returns:
        Shape (test,).
    """
    whole = values.var(axis=0, ddof=1, dtype=np.float64)
    return np.asarray(np.minimum(noise / np.where(whole > 0, whole, np.inf), 1.0))
