"""Inner products of stored rows with test gradients, and their sum by sample. NumPy only.

R(i, j) = - sum_t alpha(t) c(t) sum_b <r_b(i, t), h_b(j)>, with r_b and h_b block b of a row and of a test gradient, alpha the
step weight (`step_weights`) and c the step's gradient scale. Of a factored block, <g a^T, g' a'^T> = (g . g') (a . a').
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def add_by_sample(total: Floats, samples: NDArray[np.int64], scores: Floats) -> None:
    """`total[samples[k]] += scores[k]`, for samples that may repeat.

    Args:
        total: shape (sample, test), changed in place.
        samples: shape (row,).
        scores: shape (row, test).
    """
    if not len(samples):
        return
    order = np.argsort(samples, kind="stable")
    ordered = samples[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    if len(starts) == len(samples):  # within an epoch a sample comes once: no sums to take
        total[samples] += scores
    else:
        total[ordered[starts]] += np.add.reduceat(scores[order], starts, axis=0)
