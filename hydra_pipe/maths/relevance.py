"""Inner products of stored rows with test gradients, and their sum by sample. NumPy only.

R(i, j) = - sum_t alpha(t) c(t) sum_b <r_b(i, t), h_b(j)>. Here r_b and h_b are block b of a row
and of a test gradient, alpha is the step weight (`step_weights`), and c is the step's gradient
scale. For a factored block, <g a^T, g' a'^T> = (g . g') (a . a').
"""

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.types import F32


def add_by_sample(total: F32, samples: NDArray[np.int64], scores: F32) -> None:
    """Add `scores[k]` to `total[samples[k]]` for each k. Samples may repeat.

    Args:
        total: sum of each sample, shape (sample, test), changed in place.
        samples: sample of each row, shape (row,).
        scores: scores of each row, shape (row, test).
    """
    if not len(samples):
        return
    order = np.argsort(samples, kind="stable")
    ordered = samples[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    if len(starts) == len(samples):  # within an epoch a sample comes once: nothing to sum
        total[samples] += scores
    else:
        total[ordered[starts]] += np.add.reduceat(scores[order], starts, axis=0)
