"""Adam's preconditioner, one for all rows, split evenly between rows and test gradients.

Symbols: v the second moment, v_hat = v / (1 - beta2^t) its unbiased form, and
D = 1 / (sqrt(v_hat) + eps).

Adam moves theta by - eta / (1 - beta1^t) * D_t m_t. One D, that of the test gradients, stands for
every D_t: with rows D^(1/2) r and test gradients D^(1/2) h, Adam is momentum SGD with
mu = dampening = beta1 and step size eta / (1 - beta1^t). A late D in place of D_t loses nothing
that was measured, an early one does (docs/methods.md).
"""

import torch
from torch import Tensor

_ROUNDS = 12


def root_preconditioner(moment: Tensor, update: int, beta2: float, eps: float) -> Tensor:
    """Return D^(1/2), the shape of `moment`, in units of one over the root of the gradient.

    It is 0 where v is 0: an element that never had a gradient has no part in any row.

    Args:
        moment: v after update number `update`.
        update: t, counted from 1.
        beta2, eps: settings of Adam.
    """
    unbiased = moment / (1.0 - beta2**update)
    return inverse_root(unbiased, eps, present=unbiased > 0)


def inverse_root(square: Tensor, eps: float, present: Tensor) -> Tensor:
    """Return the root of 1 / (sqrt(square) + eps), the shape of `square`; 0 if not `present`."""
    return torch.where(present, square.sqrt().add_(eps).rsqrt_(), 0.0)


def rank_one(root: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b so that a b' is near D^(1/2), by least squares weighted by v.

    The weight is v because rows have their weight there: v is D^-2 but for eps. Elements that are
    0 have no weight. The squares are minimised over a and b in turn.

    Args:
        root: D^(1/2) of a weight, shape (O, I), not negative.

    Returns:
        a of shape (O,) and b of shape (I,), float32. 0 for a line without weight.
    """
    root = root.double() if root.device.type == "cpu" else root.float()
    weight = _weight(root)
    times = weight * root
    a, b = torch.ones_like(root[:, 0]), torch.ones_like(root[0])
    for _ in range(_ROUNDS):
        a = _ratio(times @ b, weight @ b.square())
        b = _ratio(times.T @ a, weight.T @ a.square())
    return a.float(), b.float()


def scalar_root(root: Tensor) -> float:
    """Return the number that is nearest to D^(1/2) by least squares weighted by v; 0 without v."""
    weight = _weight(root)
    return float(_ratio((weight * root).sum(), weight.sum()))


def _weight(root: Tensor) -> Tensor:
    """Return v up to a factor, at most 1: the factor keeps powers from overflowing."""
    present = root > 0
    least = root.where(present, torch.inf).amin()
    return torch.where(present, (least / root) ** 4, 0.0)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.where(below > 0, 1.0), 0.0)
