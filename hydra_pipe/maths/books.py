"""The books balance: the rows of a step sum to the gradient that the optimiser is about to use, up to one scalar.

Symbols: E_b what the rows of block b sum to, G_b the same features of its `.grad`, c the scalar (clipping, loss scaling and
data-parallel averaging each multiply all of the gradient by one number).

A factored block is never multiplied out: both sides are multiplied by one random vector u instead (Freivalds, "Fast
probabilistic algorithms", 1979). For u ~ N(0, I) a difference D is overlooked with probability 0, and E|D u|^2 = |D|_F^2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Rounding of a sum, relative to the summed norms of what is summed, in units of the dtype's epsilon.
_ROUNDING = 4.0


@dataclass(frozen=True)
class Balance:
    """How well the books of one step balance.

    Args:
        scalar: c, the gradient in use over the sum of the rows.
        imbalance: |G_b - c E_b| over the summed norms of the rows, for each block; a row's norm is taken as its largest
            element times the square root of its size, so this is a lower bound.
    """

    scalar: float
    imbalance: NDArray[np.float64]


def balance(
    expected: Sequence[Tensor], actual: Sequence[Tensor], magnitude: NDArray[np.float64], scalar: float | None = None
) -> Balance:
    """Compare what the rows sum to with what the optimiser uses.

    Args:
        expected: E_b of each block, one dimension.
        actual: G_b of each block, same shapes.
        magnitude: upper bound of the summed norms of the block's rows, shape (block,).
        scalar: c where it is known; the least-squares estimate over all blocks otherwise, but 1 where that differs from 1 by no
            more than rounding explains.
    """
    starts = np.cumsum([0, *(len(vector) for vector in expected[:-1])])
    sums = torch.cat(list(expected)).double().cpu().numpy()
    grads = torch.cat(list(actual)).double().cpu().numpy()
    if scalar is None:
        rounding = _ROUNDING * torch.finfo(expected[0].dtype).eps * float(np.linalg.norm(magnitude))
        scalar = _least_squares(sums, grads)
        if abs(scalar - 1.0) * float(np.linalg.norm(sums)) <= rounding:
            scalar = 1.0
    residual = np.sqrt(np.add.reduceat((grads - scalar * sums) ** 2, starts))
    norms = np.sqrt(np.add.reduceat(grads**2, starts))
    # rows that are all zero leave nothing to divide by: any gradient beside them is wholly unaccounted for
    reference = abs(scalar) * magnitude
    reference = np.where(reference == 0.0, norms, reference)
    # not a number stays what it is, and is over any limit
    imbalance = np.divide(residual, reference, out=np.zeros_like(residual), where=reference != 0.0)
    return Balance(scalar, imbalance)


def best_explained(
    expected: Sequence[Tensor], actual: Sequence[Tensor], magnitude: NDArray[np.float64], limit: NDArray[np.float64]
) -> Balance:
    """The balance whose scalar leaves the fewest blocks over `limit`: it names the blocks that are truly off.

    A block that is off drags the least-squares estimate with it, and then all seem off. Tried here: 1, and each block's own.
    """
    own = [_least_squares(e.double().cpu().numpy(), a.double().cpu().numpy()) for e, a in zip(expected, actual, strict=True)]
    balances = [balance(expected, actual, magnitude, scalar) for scalar in (1.0, *own)]
    return min(balances, key=lambda books: int((~(books.imbalance <= limit)).sum()))


def _least_squares(sums: NDArray[np.float64], grads: NDArray[np.float64]) -> float:
    square = float(sums @ sums)
    return float(sums @ grads) / square if square > 0.0 else 1.0
