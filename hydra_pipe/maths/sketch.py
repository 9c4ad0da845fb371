"""The random projection for anything large: a balanced count sketch.

Every coordinate is given a random sign and one of k buckets; the buckets differ in size by one at most. For x, y in R^n and
the sketch S, E[<S x, S y>] = <x, y> exactly, and Var = (q / k) (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) with
q = k * P(two coordinates share a bucket) <= 1, so never worse than a Gaussian projection of the same width (Weinberger et al.,
"Feature Hashing for Large Scale Multitask Learning", 2009, for independent buckets). It costs one pass over x.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


class Sketch:
    """A projection R^n -> R^k that is a function of (seed, block name, shape, k) alone, in any process, on any machine.

    Args:
        seed: of the run.
        name: of the block.
        shape: of the block; n is its number of elements.
        n_columns: k, at most n.
    """

    def __init__(self, seed: int, name: str, shape: tuple[int, ...], n_columns: int) -> None:
        numel = int(np.prod(shape))
        digest = hashlib.sha256(f"{seed}\n{name}\n{tuple(map(int, shape))}".encode()).digest()
        # Raw Philox words are part of NumPy's compatibility promise; what Generator makes of them is not.
        words = np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)).random_raw(2 * numel)
        self.n_columns = n_columns
        self._order = torch.from_numpy(np.argsort(words[:numel], kind="stable"))
        self._sign = torch.from_numpy(np.where(words[numel:] >> np.uint64(63), 1.0, -1.0).astype(np.float32))[self._order]

    def __call__(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Project rows of shape (B, n), times `weight` (n elements, or 1) to (B, k), in their dtype, on their device."""
        if self._order.device != rows.device:
            self._order, self._sign = self._order.to(rows.device), self._sign.to(rows.device)
        factor = self._sign if weight is None else self._sign * weight.flatten()[self._order]
        mixed = rows.index_select(1, self._order).mul_(factor)
        k = self.n_columns
        whole = mixed.shape[1] // k * k
        sums = mixed[:, :whole].reshape(len(mixed), -1, k).sum(1)
        rest = mixed[:, whole:]
        sums[:, : rest.shape[1]] += rest
        return sums
