"""The books: the check that the rows of a step sum to the gradient in use, up to one scalar.

Symbols: E_b the sum of the rows of block b, G_b the same features of its `.grad`, c the scalar.
Clipping, loss scaling and data-parallel averaging each multiply the whole gradient by one number.

A factored block is never multiplied out. Both sides are multiplied by one random vector u instead
(Freivalds, "Fast probabilistic algorithms", 1979). For u ~ N(0, I) a difference D is overlooked
with probability 0, and E|D u|^2 = |D|_F^2.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.types import F64

# Rounding of a sum, relative to the summed norms of its terms, in units of the dtype's epsilon.
_ROUNDING = 4.0
# Norms below this, 1.1e-19, are no gradients. Their squares are below the least normal float32,
# where rounding is not relative, and the norms of rows vanish.
_LEAST_NORM = float(np.sqrt(np.finfo(np.float32).tiny))


@dataclass(frozen=True)
class Balance:
    """Result of the books of some steps.

    Args:
        scalar: c of each step, the gradient in use over the sum of the rows, shape (step,).
        imbalance: |G_b - c E_b| over the summed norms of the rows, shape (step, block). The norm of
            a row is taken as its largest element times the square root of its size. So this is a
            lower bound. Norms below 1.1e-19 count as 1.1e-19.
    """

    scalar: F64
    imbalance: F64


# a value that is not finite is over any limit: no more warning is needed
@np.errstate(invalid="ignore", over="ignore")
def balance(
    sums: F64,
    grads: F64,
    starts: NDArray[np.intp],
    magnitude: F64,
    eps: float,
    scalar: float | None = None,
) -> Balance:
    """Compare the sum of the rows of each step with the gradient that the optimiser used.

    Args:
        sums: E_b of all blocks side by side, shape (step, features).
        grads: G_b of all blocks side by side, shape (step, features).
        starts: first feature of each block, shape (block,).
        magnitude: upper bound of the summed norms of the block's rows, shape (step, block).
        eps: epsilon of the dtype that the rows were summed in.
        scalar: c, if it is known. None: the least-squares estimate over all blocks, but 1 or -1 if
            the estimate differs from it by no more than rounding explains.
    """
    if scalar is None:
        scalars = _least_squares(sums, grads)
        rounding = _ROUNDING * eps * np.linalg.norm(magnitude, axis=1)
        whole = np.copysign(1.0, scalars)
        near = np.abs(scalars - whole) * np.linalg.norm(sums, axis=1) <= rounding
        scalars[near] = whole[near]
    else:
        scalars = np.full(len(sums), scalar)
    residual = np.sqrt(np.add.reduceat((grads - scalars[:, None] * sums) ** 2, starts, axis=1))
    norms = np.sqrt(np.add.reduceat(grads**2, starts, axis=1))
    # Rows that are all zero leave nothing to divide by. They explain nothing of the gradient.
    reference = np.abs(scalars)[:, None] * magnitude
    reference = np.maximum(np.where(reference == 0.0, norms, reference), _LEAST_NORM)
    # A reference that is not finite explains nothing, and not-a-number is over any limit.
    residual = np.where(np.isfinite(reference), residual, np.nan)
    imbalance = residual / reference
    # Next to norms that have overflowed, any difference would look like none.
    imbalance[~np.isfinite(reference)] = np.inf
    return Balance(scalars, imbalance)


def best_explained(
    sums: F64, grads: F64, starts: NDArray[np.intp], magnitude: F64, eps: float, limit: F64
) -> Balance:
    """Return the balance of one step whose scalar leaves the fewest blocks over `limit`.

    The blocks over the limit are then the blocks that are truly off. A block that is off drags the
    least-squares estimate with it, and then all blocks seem off. The scalars tried here are 1
    and each block's own estimate.

    Args:
        sums, grads, starts, magnitude, eps: arguments of `balance`, for one step.
        limit: largest imbalance allowed, shape (block,).
    """
    own = [
        _least_squares(e, g)[0]
        for e, g in zip(
            np.split(sums, starts[1:], axis=1), np.split(grads, starts[1:], axis=1), strict=True
        )
    ]
    balances = [balance(sums, grads, starts, magnitude, eps, scalar) for scalar in (1.0, *own)]
    return min(balances, key=lambda books: int((~(books.imbalance <= limit)).sum()))


def _least_squares(sums: F64, grads: F64) -> F64:
    squares = np.einsum("sf,sf->s", sums, sums)
    products: F64 = np.einsum("sf,sf->s", sums, grads)
    scalars: F64 = np.divide(products, squares, out=np.ones_like(squares), where=squares > 0.0)
    return scalars
