"""The books balance: the rows of a step sum to the gradient that the optimiser is about to use, up to one scalar.

Symbols: E_b what the rows of block b sum to, G_b the same features of its `.grad`, c the scalar (clipping, loss scaling and
data-parallel averaging each multiply all of the gradient by one number).

A factored block is never multiplied out: both sides are multiplied by one random vector u instead (Freivalds, "Fast
probabilistic algorithms", 1979). For u ~ N(0, I) a difference D is overlooked with probability 0, and E|D u|^2 = |D|_F^2.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Rounding of a sum, relative to the summed norms of what is summed, in units of the dtype's epsilon.
_ROUNDING = 4.0


@dataclass(frozen=True)
class Balance:
    """How well the books of some steps balance.

    Args:
        scalar: c of each step, the gradient in use over the sum of the rows, shape (step,).
        imbalance: |G_b - c E_b| over the summed norms of the rows, shape (step, block); a row's norm is taken as its largest
            element times the square root of its size, so this is a lower bound.
    """

    scalar: Floats
    imbalance: Floats


@np.errstate(invalid="ignore", over="ignore")  # what is not finite is over any limit, which is all the warning there need be
def balance(
    sums: Floats, grads: Floats, starts: NDArray[np.intp], magnitude: Floats, eps: float, scalar: float | None = None
) -> Balance:
    """Compare what the rows of each step sum to with what the optimiser used.

    Args:
        sums: E_b of all blocks side by side, shape (step, features).
        grads: G_b likewise.
        starts: where each block begins in them, shape (block,).
        magnitude: upper bound of the summed norms of the block's rows, shape (step, block).
        eps: of the dtype that the rows were summed in.
        scalar: c where it is known; the least-squares estimate over all blocks otherwise, but 1 where that differs from 1 by no
            more than rounding explains.
    """
    if scalar is None:
        scalars = _least_squares(sums, grads)
        rounding = _ROUNDING * eps * np.linalg.norm(magnitude, axis=1)
        scalars[np.abs(scalars - 1.0) * np.linalg.norm(sums, axis=1) <= rounding] = 1.0
    else:
        scalars = np.full(len(sums), scalar)
    residual = np.sqrt(np.add.reduceat((grads - scalars[:, None] * sums) ** 2, starts, axis=1))
    norms = np.sqrt(np.add.reduceat(grads**2, starts, axis=1))
    # rows that are all zero leave nothing to divide by: any gradient beside them is wholly unaccounted for
    reference = np.abs(scalars)[:, None] * magnitude
    reference = np.where(reference == 0.0, norms, reference)
    # a reference that is not finite explains nothing, and what is not a number is over any limit
    residual = np.where(np.isfinite(reference), residual, np.nan)
    imbalance = np.divide(residual, reference, out=np.zeros_like(residual), where=reference != 0.0)
    # beside norms that have overflowed any difference would be as good as none
    imbalance[~np.isfinite(reference)] = np.inf
    return Balance(scalars, imbalance)


def best_explained(sums: Floats, grads: Floats, starts: NDArray[np.intp], magnitude: Floats, eps: float, limit: Floats) -> Balance:
    """The balance of one step whose scalar leaves the fewest blocks over `limit`: it names the blocks that are truly off.

    A block that is off drags the least-squares estimate with it, and then all seem off. Tried here: 1, and each block's own.

    Args:
        sums, grads, starts, magnitude, eps: as in `balance`, of one step.
        limit: shape (block,).
    """
    own = [
        _least_squares(e, g)[0]
        for e, g in zip(np.split(sums, starts[1:], axis=1), np.split(grads, starts[1:], axis=1), strict=True)
    ]
    balances = [balance(sums, grads, starts, magnitude, eps, scalar) for scalar in (1.0, *own)]
    return min(balances, key=lambda books: int((~(books.imbalance <= limit)).sum()))


def _least_squares(sums: Floats, grads: Floats) -> Floats:
    squares = np.einsum("sf,sf->s", sums, sums)
    products: Floats = np.einsum("sf,sf->s", sums, grads)
    scalars: Floats = np.divide(products, squares, out=np.ones_like(squares), where=squares > 0.0)
    return scalars
