"""The number of labels to propose, from chances of being wrong and without any truth."""

import numpy as np

from hydra_pipe.types import F64


def expected_f1_cut(chances: F64) -> int:
    """Return the number of proposals with the largest expected F1.

    The first k of the samples in falling order of their chances pi have about

        F1(k) = 2 sum of the first k pi / (k + sum of all pi)

    Args:
        chances: chance of each label to be wrong, shape (sample,).

    Returns:
        k, the fewest of those with the largest F1. 0 if no label can be wrong.
    """
    ordered = np.sort(chances)[::-1]
    total = ordered.sum()
    if total <= 0:
        return 0
    counts = np.arange(1, len(ordered) + 1)
    return int((2 * np.cumsum(ordered) / (counts + total)).argmax()) + 1


def cautious_cut(chances: F64) -> int:
    """Return the number of labels that are likelier wrong than right."""
    return int((chances > 0.5).sum())
