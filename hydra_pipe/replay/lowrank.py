"""`--rank K`: exact relevance of a few directions corrects the approximate relevance of all tests.

Relevance is linear in the test gradient. Take the matrix whose rows are the test gradients h_j,
each divided by its norm. Let b_1 .. b_K be its right singular vectors of the K largest singular
values. Then h_j = |h_j| (sum_k c_jk b_k + rest). The b_k are replayed. The rest is left to the
approximation A, which is linear too:

    R(h_j) = A(h_j) + |h_j| sum_k c_jk (R(b_k) - A(b_k)),      A(b_k) = sum_j m_kj A(h_j)
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.types import F64


@dataclass(frozen=True)
class Basis:
    """Directions that most of the test gradients lie in.

    Args:
        vectors: the directions b_k, one tensor (direction, ...) for each parameter.
        mixing: the factors m_kj in b_k = sum_j m_kj h_j, shape (direction, test).
        coefficients: |h_j| c_jk, shape (test, direction).
        held: share of the squared norm of the h_j / |h_j| that the directions hold.
    """

    vectors: list[Tensor]
    mixing: F64
    coefficients: F64
    held: float


def basis_of(gradients: list[Tensor], rank: int) -> Basis:
    """Return the `rank` leading directions of the test gradients, or all if there are fewer.

    Args:
        gradients: test gradients h, one tensor (test, ...) for each parameter.
        rank: number of directions, K.
    """
    flat = torch.cat([g.flatten(1) for g in gradients], dim=1)
    norms = torch.linalg.vector_norm(flat, dim=1)
    unit = flat / norms.clamp(min=torch.finfo(flat.dtype).tiny)[:, None]
    # products of float32 vectors are good to a part in a million: smaller directions are rounding
    values, vectors = np.linalg.eigh((unit @ unit.T).double().cpu().numpy())
    values, vectors = values[::-1], vectors[:, ::-1]
    n = int(min(rank, (values > 1e-6 * values[0]).sum()))
    root = np.sqrt(values[:n])
    length = norms.double().cpu().numpy()
    mixing = (vectors[:, :n] / root).T / np.maximum(length, np.finfo(np.float64).tiny)
    mixed = torch.from_numpy(mixing).to(flat) @ flat
    pieces = torch.split(mixed, [g[0].numel() for g in gradients], dim=1)
    directions = [
        piece.reshape(n, *g.shape[1:]).contiguous()
        for piece, g in zip(pieces, gradients, strict=True)
    ]
    return Basis(
        directions,
        mixing,
        length[:, None] * vectors[:, :n] * root,
        float(values[:n].sum() / max(values.sum(), 1e-300)),
    )


def corrected(approximate: NDArray[np.floating], exact: F64, basis: Basis) -> F64:
    """Return the corrected relevance of every test sample, shape (sample, test).

    Args:
        approximate: approximate relevance A(h_j), shape (sample, test).
        exact: exact relevance R(b_k) of the directions, shape (sample, direction).
        basis: directions of the test gradients.
    """
    found: F64 = approximate + (exact - approximate @ basis.mixing.T) @ basis.coefficients.T
    return found
