"""Adam's preconditioner, split evenly between rows and test gradients.

Symbols: v the second moment, v_hat = v / (1 - beta2^t) its unbiased form, D = 1 / (sqrt(v_hat) + eps).

Adam moves theta by - eta / (1 - beta1^t) * D_t m_t. With D_t as it was at step t, rows q = D_t^(1/2) r and test gradients
D_T^(1/2) h, Adam is momentum SGD with mu = dampening = beta1 and step size eta / (1 - beta1^t): docs/architecture.md, "Adam".
"""

from torch import Tensor


def second_moment(previous: Tensor | None, gradient: Tensor, beta2: float) -> Tensor:
    """v_t from v_{t-1}, None before the first update, and the gradient of step t; same shape."""
    square = gradient.square().mul_(1.0 - beta2)
    return square if previous is None else square.add_(previous, alpha=beta2)


def root_preconditioner(moment: Tensor, update: int, beta2: float, eps: float) -> Tensor:
    """D^(1/2), the shape of `moment`, in units of one over the root of the gradient.

    Args:
        moment: v after update number `update`, counted from 1.
        update: t.
        beta2, eps: as Adam takes them.
    """
    unbiased = moment / (1.0 - beta2**update)
    return unbiased.sqrt_().add_(eps).rsqrt_()
