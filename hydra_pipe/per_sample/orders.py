"""Place of each sample in a tensor: the dimension, and the order along it.

Symbols: B samples in a pass, L the length of the dimension that holds them, k = L / B entries of
each sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """Place of the samples in a tensor.

    Args:
        dim: the dimension that holds the samples. Its length L is a multiple of the batch B.
        major: True: the k entries of a sample are neighbours (windows of a picture). False: entry 0
            of all samples comes first, then entry 1 of all samples (time steps before samples).
    """

    dim: int = 0
    major: bool = True

    def fits(self, value: Tensor, batch: int) -> bool:
        """Tell whether `value` may hold `batch` samples in this order."""
        return (
            value.dim() > self.dim
            and value.shape[self.dim] > 0
            and value.shape[self.dim] % batch == 0
        )

    def split(self, value: Tensor, batch: int) -> Tensor:
        """Return `value` by sample, shape (B, k, the other dimensions).

        The result is a view if `value` allows a view.
        """
        first = value.movedim(self.dim, 0)
        rest = first.shape[1:]
        if self.major:
            return first.reshape(batch, -1, *rest)
        return first.reshape(-1, batch, *rest).transpose(0, 1)

    def only(self, value: Tensor, batch: int, sample: int) -> Tensor:
        """Return a copy of `value` with zeros in place of every sample but `sample`."""
        alone = torch.zeros_like(value)
        self.split_view(alone, batch)[sample] = self.split_view(value, batch)[sample]
        return alone

    def split_view(self, value: Tensor, batch: int) -> Tensor:
        """Split like `split`, without a copy: writing to the result writes to `value`.

        The samples come first, then k, then the other dimensions.
        """
        k = value.shape[self.dim] // batch
        sizes = (batch, k) if self.major else (k, batch)
        found: Tensor = value.unflatten(self.dim, sizes)  # type: ignore[no-untyped-call]
        at, other = (self.dim, self.dim + 1) if self.major else (self.dim + 1, self.dim)
        return found.movedim((at, other), (0, 1))


@dataclass(frozen=True, slots=True)
class _Whole(SampleOrder):
    """Order of a batch of one: all entries belong to the sample."""

    def fits(self, value: Tensor, batch: int) -> bool:
        return batch == 1

    def only(self, value: Tensor, batch: int, sample: int) -> Tensor:
        return value


#: Order of a batch of one: all entries belong to the sample, whatever the shape. Only `fits` and
#: `only` serve it.
WHOLE: SampleOrder = _Whole()
#: The usual order: the first dimension holds the samples, with the positions of one sample after
#: the positions of another.
FIRST = SampleOrder()
#: Order of entry 0 of all samples, then entry 1 of all samples, along the first dimension.
INTERLEAVED = SampleOrder(major=False)


def order_of(
    gradient: Tensor, batch: int, sample: int, *likeliest: SampleOrder
) -> SampleOrder | None:
    """Return the order that explains a gradient which comes from `sample` alone.

    Args:
        gradient: gradient at some tensor of a pass, zero where `sample` has no part; or a mask of
            the entries in which it has a part. Not zero everywhere.
        batch: number of samples of the pass.
        sample: place of the sample whose output the gradient comes from.
        likeliest: orders to prefer if several explain the gradient, the likeliest first. `FIRST`
            comes next.

    Returns:
        The order, or None if the gradient reaches entries of other samples in every order.
    """
    reached = gradient if gradient.dtype == torch.bool else gradient != 0
    # reached entries of each dimension, shape (L,)
    along: dict[int, Tensor] = {}
    candidates = [
        *likeliest,
        *(SampleOrder(dim, major) for dim in range(gradient.dim()) for major in (True, False)),
    ]
    for order in candidates:
        if order.fits(gradient, batch):
            if order.dim not in along:
                length = gradient.shape[order.dim]
                along[order.dim] = reached.movedim(order.dim, 0).reshape(length, -1).any(1)
            by_sample = SampleOrder(major=order.major).split(along[order.dim], batch).any(1)
            by_sample[sample] = False
            if not bool(by_sample.any()):
                return order
    return None
