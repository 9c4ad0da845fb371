"""One training step, differentiated backward: from the adjoints after it to the adjoints before it.

Symbols: theta parameters; G their batch gradient, the gradient of sum_i w_i l_i / n at w = 1; c(G)
G that gradient clipped; g the gradient that the optimiser makes of it; b SGD's momentum buffer; m,
s Adam's moments. eta learning rate, mu momentum, tau dampening, lambda weight decay, beta_1,
beta_2, eps Adam's. The adjoint of x is d l_j(theta_T) / d x, for each column j. The adjoint of
theta is called a, the others go by name.

    start      a = grad l_j(theta_T), the others 0
    step t     adjoints of c(G) G from those of the optimiser's state  `sgd_adjoint`, `adam_adjoint`
               u, of G itself                                          `unclipped`
               dl_j / dw_i += <u, grad l_i / n>,  a += H u             replay/products.py

H is the Hessian of the batch loss.

All tensors of adjoints have shape (column, *parameter's), and the parameter's dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SgdStep:
    """Settings of torch.optim.SGD at a step, for one parameter.

    Args:
        learning_rate, momentum, dampening, weight_decay: eta, mu, tau, lambda.
        nesterov: True if the step was Nesterov's.
        started: True if the step made the momentum buffer. PyTorch sets a new buffer to the
            gradient itself.
    """

    learning_rate: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    started: bool


def sgd_adjoint(step: SgdStep, a: Tensor, buffer: Tensor) -> Tensor:
    """Go back over b = mu b + (1 - tau) g, theta = theta - eta b, with g = c(G) G + lambda theta.

    Args:
        step: settings of the step.
        a, buffer: adjoints of theta and of b after the step. They are changed in place to the
            adjoints before the step, except for the part that comes through G.

    Returns:
        The adjoint of g, which equals the adjoint of c(G) G.
    """
    moved = -step.learning_rate * a
    if step.momentum == 0.0:  # the step neither reads nor writes the buffer
        found = moved
    else:
        gain = 1.0 if step.started else 1.0 - step.dampening
        if step.nesterov:
            buffer.add_(moved, alpha=step.momentum)
            found = moved.add_(buffer, alpha=gain)
        else:
            buffer.add_(moved)
            found = gain * buffer
        buffer.mul_(0.0 if step.started else step.momentum)
    if step.weight_decay:
        a.add_(found, alpha=step.weight_decay)
    return found


@dataclass(frozen=True)
class AdamStep:
    """Settings of torch.optim.Adam and AdamW at a step, for one parameter.

    Args:
        learning_rate, beta1, beta2, eps, weight_decay: eta, beta_1, beta_2, eps, lambda.
        decoupled: True if the decay shrinks theta itself (AdamW) and is no part of g.
        number: number of the parameter's updates, this one included.
    """

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    number: int


@dataclass(frozen=True)
class Moments:
    """Adam's state of one parameter after a step, and its gradient. All have the parameter's shape.

    Args:
        gradient: g.
        first, second: m and s.
    """

    gradient: Tensor
    first: Tensor
    second: Tensor


def adam_adjoint(
    step: AdamStep, moments: Moments, a: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Go back over a step of Adam. The second moment is differentiated too.

    The step is theta = (1 - eta lambda) theta - eta m_hat / (sqrt(s_hat) + eps),
    m = beta_1 m + (1 - beta_1) g, s = beta_2 s + (1 - beta_2) g^2. If s is exactly 0, the gradient
    was 0 at every step. Then the derivative of the root is taken to be 0.

    Args:
        step: settings of the step.
        moments: state of the step.
        a, first, second: adjoints of theta, m and s after the step. They are changed in place to
            the adjoints before the step, except for the part that comes through G.

    Returns:
        The adjoint of g, which equals the adjoint of c(G) G.
    """
    size = step.learning_rate / (1.0 - step.beta1**step.number)
    correction = (1.0 - step.beta2**step.number) ** 0.5
    root = moments.second.sqrt()
    denominator = root / correction + step.eps
    first.addcmul_(a, -size / denominator)
    slope = torch.where(
        root > 0, size * moments.first / (2.0 * correction * root * denominator**2), 0.0
    )
    second.addcmul_(a, slope)
    found = (1.0 - step.beta1) * first
    found.addcmul_(second, 2.0 * (1.0 - step.beta2) * moments.gradient)
    first.mul_(step.beta1)
    second.mul_(step.beta2)
    if step.decoupled:
        a.mul_(1.0 - step.learning_rate * step.weight_decay)
    elif step.weight_decay:
        a.add_(found, alpha=step.weight_decay)
    return found


def unclipped(adjoints: list[Tensor], gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Return the adjoint of G from the adjoint of c(G) G.

    c = min(1, max_norm / (|G| + 1e-6)), as in torch.nn.utils.clip_grad_norm_. If the step clips,
    u = c g - c / ((|G| + 1e-6) |G|) <g, G> G, with g here the adjoint of c(G) G.

    Args:
        adjoints: adjoints of c(G) G, one tensor (column, ...) for each parameter.
        gradients: G of the same parameters, not clipped.
        max_norm: norm that the gradient is clipped to.
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    scale = float(max_norm / (norm + 1e-6))
    if scale >= 1.0:
        return adjoints
    along = sum(torch.einsum("c...,...->c", u, g) for u, g in zip(adjoints, gradients, strict=True))
    assert isinstance(along, Tensor)
    share = along * (scale / float((norm + 1e-6) * norm))
    return [
        scale * u - torch.einsum("c,...->c...", share, g)
        for u, g in zip(adjoints, gradients, strict=True)
    ]
