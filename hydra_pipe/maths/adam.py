"""Adam's preconditioner, split evenly between rows and test gradients.

Symbols: v the second moment, v_hat = v / (1 - beta2^t) its unbiased form, and
D = 1 / (sqrt(v_hat) + eps).

Adam moves theta by - eta / (1 - beta1^t) * D_t m_t. D_t is taken as it was at step t. With rows
q = D_t^(1/2) r and test gradients D_T^(1/2) h, Adam is momentum SGD with mu = dampening = beta1
and step size eta / (1 - beta1^t). See docs/architecture.md, "Adam".
"""

from torch import Tensor


def second_moment(previous: Tensor | None, gradient: Tensor, beta2: float) -> Tensor:
    """Return v_t, the shape of `gradient`.

    Args:
        previous: v_{t-1}, None before the first update.
        gradient: gradient of step t, the shape of v.
        beta2: setting of Adam.
    """
    square = gradient.square().mul_(1.0 - beta2)
    return square if previous is None else square.add_(previous, alpha=beta2)


def root_preconditioner(moment: Tensor, update: int, beta2: float, eps: float) -> Tensor:
    """Return D^(1/2), the shape of `moment`, in units of one over the root of the gradient.

    Args:
        moment: v after update number `update`.
        update: t, counted from 1.
        beta2, eps: settings of Adam.
    """
    unbiased = moment / (1.0 - beta2**update)
    return unbiased.sqrt_().add_(eps).rsqrt_()
