"""Random projection of sums of outer products: both sides are projected before the product.

It serves weights whose gradient is a sum over positions of outer products.

Symbols: X and Y gradients of shape (O, I), with rows x_i and columns x^a; S (k_out, O) and
T (k_in, I) independent random signs.

K X = S X T' / sqrt(k_out k_in). If X = sum_p l_p r_p', this is sum_p (S l_p)(T r_p)'. So X is
never formed. S'S / k_out has a diagonal of exact ones. Off the diagonal, it has uncorrelated
entries of mean 0 and variance 1/k_out. T'T / k_in has the same form. So E<K X, K Y> = <X, Y>
exactly, and Var<K X, K Y> is the sum of

    V_out  = (|X Y'|^2 + <X Y', Y X'> - 2 sum_i <x_i, y_i>^2) / k_out
    V_in   = (|X' Y|^2 + <X' Y, Y' X> - 2 sum_a <x^a, y^a>^2) / k_in
    V_both = (|X|^2 |Y|^2 + <X, Y>^2 + |X Y'|^2 + |X' Y|^2 + 4 sum_ia X_ia^2 Y_ia^2
              - 2 sum_i (|x_i|^2 |y_i|^2 + <x_i, y_i>^2)
              - 2 sum_a (|x^a|^2 |y^a|^2 + <x^a, y^a>^2)) / (k_out k_in)

V_out is 0 if S is the identity, V_in is 0 if T is, and V_both is 0 if either is.

Each numerator is at most 2, 2 and 4 times |X|^2 |Y|^2, hence

    Var<K X, K Y> <= ((1 + 2/k_out)(1 + 2/k_in) - 1) |X|^2 |Y|^2,

with 2/k taken as 0 on a side that is the identity.

With I = 1 it is the formula of `hydra_pipe.maths.sketch` with q = 1. Outer products come close to
the bound. For as many columns a sketch is more exact (2/k against about 4/sqrt(k)), but needs X.
"""

from collections.abc import Callable
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from hydra_pipe.maths.sketch import philox_of


class Kron:
    """A projection R^(O I) -> R^(k_out k_in).

    It is a function of (seed, block name, shape, k_out, k_in) alone.

    Args:
        seed: seed of the run.
        name: name of the block.
        shape: shape of the block.
        k_out, k_in: columns of each side. A side with as many columns as inputs is the identity.
        sides: (O, I), whose product is the block's number of elements.

    Raises:
        ValueError: the sides do not make up the shape, or k of a side is not between 1 and its
            size.
    """

    def __init__(
        self,
        seed: int,
        name: str,
        shape: tuple[int, ...],
        k_out: int,
        k_in: int,
        sides: tuple[int, int],
    ) -> None:
        outputs, inputs = sides
        if outputs * inputs != np.prod(shape) or not (
            1 <= k_out <= outputs and 1 <= k_in <= inputs
        ):
            raise ValueError(
                f"{name} of shape {tuple(shape)} cannot be projected from {outputs} x {inputs} "
                f"to {k_out} x {k_in}"
            )
        self.n_columns = k_out * k_in
        self._sides = sides
        of_block = f"{seed}\n{name}\n{tuple(map(int, shape))}"
        self._out = _signs(f"{of_block}\nout", k_out, outputs)
        self._in = _signs(f"{of_block}\nin", k_in, inputs)
        # The result is scaled, not the signs. Signs are exact in any dtype, so rounding does not
        # bias the projection.
        self._scale = 1 / sqrt(
            (1 if self._out is None else k_out) * (1 if self._in is None else k_in)
        )

    def __call__(self, rows: Tensor) -> Tensor:
        """Project `rows` of shape (B, O * I) to (B, k_out * k_in).

        The result has their dtype and is on their device.
        """
        signs_out, signs_in = self._signs_like(rows)
        halfway = _times(rows.reshape(len(rows), *self._sides), signs_in)
        return _times(halfway.transpose(1, 2), signs_out).transpose(1, 2).flatten(1) * self._scale

    def of_products(self, left: Tensor, right_times: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Project sums of outer products, row_i = sum_p outer(left[i, p], right[i, p]).

        The rows are not written out.

        Args:
            left: left factors, shape (B, P, O).
            right_times: function of a matrix of shape (k, I). It returns `right`, shape (B, P, I),
                times the transpose of the matrix. For None it returns `right`.

        Returns:
            The result of `__call__` on the rows, shape (B, k_out * k_in).
        """
        signs_out, signs_in = self._signs_like(left)
        projected = torch.bmm(_times(left, signs_out).transpose(1, 2), right_times(signs_in))
        return projected.flatten(1) * self._scale

    def _signs_like(self, values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return S and T in the dtype and on the device of `values`."""
        self._out = None if self._out is None else self._out.to(values)
        self._in = None if self._in is None else self._in.to(values)
        return self._out, self._in


def _times(values: Tensor, signs: Tensor | None) -> Tensor:
    """Project values of shape (B, n, size) to (B, n, k)."""
    return values if signs is None else values @ signs.T


def _signs(key: str, k: int, size: int) -> Tensor | None:
    """Return random signs of shape (k, size), a function of `key`.

    None, for the identity, if `k` is `size`.
    """
    if k == size:
        return None
    words = philox_of(key).random_raw(k * size)
    return torch.from_numpy(np.where(words >> np.uint64(63), 1.0, -1.0).astype(np.float32)).reshape(
        k, size
    )
