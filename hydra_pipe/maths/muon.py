"""Muon's orthogonalisation, and the one number for each matrix that stands for it.

Muon (Jordan et al. 2024) moves a matrix theta by - eta O. O = NS(U) has the singular vectors of the
momentum U, and singular values near 1: a few steps of Newton and Schulz, each a polynomial.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonalized(
    matrix: Tensor, coefficients: Sequence[float], n_steps: int, eps: float
) -> Tensor:
    """Return NS(U), of the dtype of U. torch.optim.Muon takes the same steps in bfloat16.

    Args:
        matrix: U, shape (O, I).
        coefficients: a, b and c of a step X -> a X + b (X X') X + c (X X')^2 X.
        n_steps: number of steps.
        eps: least norm that U is divided by.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    found: Tensor = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=eps)
    for _ in range(n_steps):
        gram = found @ found.T
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.T if tall else found


def rate_of_shape(shape: Sequence[int], adjustment: str | None) -> float:
    """Return the factor of the learning rate by the shape of the matrix.

    Args:
        shape: O and I.
        adjustment: the option `adjust_lr_fn` of torch.optim.Muon.
    """
    rows, columns = shape
    if adjustment == "match_rms_adamw":
        return float(0.2 * max(rows, columns) ** 0.5)
    return float(max(1.0, rows / columns) ** 0.5)


def best_multiple(of: Tensor, near: Tensor) -> Tensor:
    """Return the number s for which s `of` is nearest to `near`, a scalar; 0 if `of` is 0."""
    square = (of * of).sum()
    return torch.where(square > 0, (of * near).sum() / square, 0.0)
