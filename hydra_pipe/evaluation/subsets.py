"""Random subsets of the training samples, and how many samples a share of them is."""

from math import floor

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import UsageError
from hydra_pipe.types import I64


def n_dropped(drop: float, n_samples: int) -> int:
    """Return how many samples the share `drop` is, rounded; a half of an odd number is rounded up.

    Raises:
        UsageError: the share is none of the samples, or all of them.
    """
    n = floor(drop * n_samples + 0.5)
    if not 0 < n < n_samples:
        raise UsageError(
            f"--drop {drop:g} of {n_samples:,} samples is {n:,} samples: give a share that drops "
            f"some and keeps some, such as {max(1, round(n_samples / 100)) / n_samples:.3g}"
        )
    return n


def random_weights(index: int, n_samples: int, n_left_out: int, seed: int) -> NDArray[np.float32]:
    """Return the weights of a random subset, shape (sample,).

    The weight is 0 for the `n_left_out` samples that are left out, and 1 for the others.

    Args:
        index: number of the subset.
        n_samples: number of samples.
        n_left_out: number of samples to leave out.
        seed: seed of all subsets.
    """
    weights = np.zeros(n_samples, np.float32)
    weights[random_order(n_samples, seed, index)[: n_samples - n_left_out]] = 1.0
    return weights


def random_order(n_samples: int, seed: int, index: int) -> I64:
    """Return the ids of the samples in random order number `index`. Shape (sample,)."""
    return np.random.default_rng([seed, index]).permutation(n_samples)
