"""Curvature weights: the second derivative of the loss that a row of the Fisher stands for.

The Fisher is the empirical Fisher, made of rows.

Symbols: o_i the model's output for sample i, l_i its loss, g_i = grad l_i and H_i = hess l_i in
o_i, B samples in the step, T_i *positions* of sample i. Positions are parts of the output whose
losses are added up or averaged, such as the tokens of a text (1 for one classification). The
Fisher |B| sum_i rho_i r_i r_i^T has, in the output's coordinates, the trace of one position's
Hessian if

    rho_i = tr H_i / (T_i |g_i|^2)

The whole trace is T times larger. But the Hessian spreads it over T directions or more. The Fisher
has a single direction, r_i. Along r_i, which is all that the Fisher describes, T times as much
would be too much.

If p = softmax(o) or sigmoid(o) and y is the target, cross-entropy has g = p - y, and
tr H = sum p (1 - p) in both cases. The gradient alone identifies such a loss: each element of g
below zero belongs to y. If the loss is c times cross-entropy, or a sum of such terms over
positions, rho_i = sum tr H / (T c sum |p - y|^2).

A row that is zero stands for nothing: rho = 0.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from hydra_pipe.errors import PipelineError
from hydra_pipe.types import F32, F64

# Softmax over the last or the second dimension, or a sigmoid for each output.
Link = Literal["softmax", "softmax, classes second", "sigmoid"]
LINKS: tuple[Link, ...] = ("softmax", "softmax, classes second", "sigmoid")

# Up to EXACT_COORDINATES outputs of a sample, the Hessian's trace is found coordinate by
# coordinate. Beyond, it is estimated with as many vectors of random signs.
EXACT_COORDINATES = 256

# Largest relative difference between a gradient and its closed form. Large logits are rounded
# by as much.
_TOLERANCE = 1e-4
# Smallest probability of a target: the loss of a smaller one has no float64.
_SMALLEST = 1e-300
# Largest difference between the gradient and the gradient of the loss taken again, relative to
# the largest gradient at a sample's output.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Loss = Callable[[Tensor, Tensor], Tensor]


def fits(link: Link, output: Tensor) -> bool:
    """Tell whether an output of this shape may be the input of `link`."""
    if link == "sigmoid":
        return True
    return (
        output.dim() > (2 if link == "softmax, classes second" else 1)
        and output.shape[_classes(link)] > 1
    )


def cross_entropy_statistics(output: Tensor, gradient: Tensor, link: Link) -> Tensor:
    """Return the statistics of each sample for `cross_entropy_weights`, sums over its positions.

    Args:
        output: output of the model, shape (B, ...).
        gradient: gradient of the loss at the output, whatever the reduction; the same shape.
        link: map from output to p.

    Returns:
        tr H, |p - y|^2, (p - y) . g, |g|^2, T, the loss, and one more than the number of the
        target class, shape (B, 7), float64. Positions without a gradient (padding that the loss
        ignores) do not count. The last is 0 where there is no target class.
    """
    batch = len(output)
    if link == "sigmoid":
        gradient = gradient.double()
        p = torch.sigmoid(output.double())
        residual = p - (gradient < 0).double()
        # -log p of a target 1, and -log(1 - p) of a target 0
        loss = softplus(torch.where(gradient < 0, -output.double(), output.double()))
        terms = torch.stack(
            [
                p * (1 - p),
                residual * residual,
                residual * gradient,
                gradient * gradient,
                torch.ones_like(p),
                loss,
                torch.zeros_like(p),
            ]
        )
        return torch.where(gradient != 0, terms, 0.0).reshape(7, batch, -1).sum(2).T
    # Shape (position, class). The large arrays are used in products only: one pass each.
    classes = output.shape[_classes(link)]
    gradient = gradient.movedim(_classes(link), -1).reshape(-1, classes)
    p = torch.softmax(
        output.movedim(_classes(link), -1).reshape(-1, classes), 1, dtype=torch.float64
    )
    g_y, target = gradient.min(1, keepdim=True)
    p_y = p.gather(1, target)[:, 0]
    gradient, g_y = gradient.double(), g_y[:, 0].double()
    square, product = _dot(p, p), _dot(p, gradient)
    # sum p (1 - p) = 1 - |p|^2; |p - y|^2 = |p|^2 - 2 p_y + 1
    one = torch.ones_like(g_y)
    loss, number = -p_y.clamp_min(_SMALLEST).log(), target[:, 0].double() + 1
    residual, norm = square - 2 * p_y + 1, _dot(gradient, gradient)
    terms = torch.stack([1 - square, residual, product - g_y, norm, one, loss, number])
    terms = torch.where(g_y != 0, terms, 0.0)
    return (terms if terms.shape[1] == batch else terms.reshape(7, batch, -1).sum(2)).T


def losses_and_targets(statistics: F64) -> tuple[F32, NDArray[np.int32]]:
    """Return the loss and the target class of each sample.

    Args:
        statistics: results of `cross_entropy_statistics`, shape (B, 7).

    Returns:
        The mean of the losses of a sample's positions, shape (B,), 0 for a sample without a
        gradient. And the target class, shape (B,), -1 for a sample with several positions or none.
    """
    positions, losses, numbers = statistics.T[4:]
    targets = np.where(positions == 1, numbers - 1, -1)
    return _as_float32(losses / np.maximum(positions, 1.0)), targets.astype(np.int32)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of the rows of two matrices."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


def cross_entropy_weights(
    statistics: NDArray[np.float64],
    sizes: NDArray[np.int64],
    batches: NDArray[np.int64],
    eps: float,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return rho of the samples of some backward passes, and the passes of cross-entropy losses.

    Args:
        statistics: results of `cross_entropy_statistics`, one pass after the other.
        sizes: number of samples of each pass.
        batches: |B| of each pass: number of samples of the whole step. A pass may hold a part.
        eps: epsilon of the dtype that the gradients went through.

    Returns:
        rho, shape (B,), for rows that are gradients of their pass, so that a factor in its loss
        counts; and a flag for each pass, shape (pass,), True if rho is known. It is False if the
        loss is not cross-entropy, or has a factor of its own for each sample (a weighted or a focal
        loss). It is False for a pass of one sample too, which cannot show such factors.
    """
    starts = np.cumsum(sizes) - sizes
    trace, residual, product, square, positions = statistics.T[:5]
    with np.errstate(invalid="ignore", divide="ignore"):
        factors = np.add.reduceat(product, starts) / np.add.reduceat(residual, starts)
        factor = np.repeat(factors, sizes)
        # Gradient that cross-entropy leaves unexplained, in units of the factor. The tolerance has
        # a constant part, since p is rounded however near it is to the target.
        left = np.sqrt(np.maximum(square - 2 * factor * product + factor**2 * residual, 0.0))
        good = left <= factor * max(_TOLERANCE, 4 * eps) * (1.0 + np.sqrt(residual))
        rho = np.where(
            residual > 0.0, trace / (positions * np.repeat(batches, sizes) * factor * residual), 0.0
        )
    known = (
        (sizes > 1) & (factors > 0.0) & np.isfinite(factors) & np.logical_and.reduceat(good, starts)
    )
    return _as_float32(rho), known


def curvature_weights(
    loss: Loss, output: Tensor, target: Tensor, gradient: Tensor, batch: int
) -> tuple[F32, F32]:
    """Return rho and the losses of the samples of one backward pass, for any loss.

    Squared error has a closed form. Other losses are differentiated. The trace is exact up to
    `EXACT_COORDINATES` outputs a sample. Beyond, it is Hutchinson's unbiased estimate, which is
    exact too if the Hessian is diagonal.

    Args:
        loss: (output, target) -> one loss for each sample, shape (B,).
        output: output of the model, shape (B, ...).
        target: target, shape (B, ...).
        gradient: gradient that arrived at the output, the shape of `output`. It shows the factor by
            which the training loop multiplied the losses.
        batch: |B|, number of samples of the whole step. The pass may hold a part of them.

    Returns:
        rho, shape (B,), for rows that are gradients of that pass. It is not-a-number if `gradient`
        is not a gradient of this loss, or if autograd has no second derivative of the loss. And
        the losses, shape (B,), not-a-number if `gradient` is not a gradient of this loss.

    Raises:
        PipelineError: the loss does not return one value for each sample.
    """
    output = (
        output.detach().float()
        if output.dtype in (torch.float16, torch.bfloat16)
        else output.detach()
    )
    leaf = output.clone().requires_grad_()
    with torch.enable_grad():
        losses = loss(leaf, target)
        if losses.shape != (len(output),):
            raise PipelineError(
                f"the loss has shape {tuple(losses.shape)} for a batch of {len(output)}: it must "
                "be one for each sample"
            )
        (own,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
    squares = own.detach().double().pow(2).flatten(1).sum(1)
    factor = (own.detach().double() * gradient.double()).sum() / squares.sum()
    left = (gradient.double() - factor * own.detach().double()).pow(2).flatten(1).sum(1).sqrt()
    unknown = np.full(len(output), np.nan, np.float32)
    if not bool((left <= factor * _ROUNDING[gradient.dtype] * squares.sqrt().max()).all()):
        return unknown, unknown
    of_samples = losses.detach().float().cpu().numpy()
    trace = _squared_error_trace(output, target, own.detach())
    positions = _positions(output, target) if trace is None else output.numel() // len(output)
    if trace is None:
        try:
            trace = _trace(own, leaf)
        except RuntimeError:  # torch has no derivative
            return unknown, of_samples
    rho = torch.where(squares > 0, trace / (positions * batch * factor * squares), 0.0)
    return _as_float32(rho.cpu().numpy()), of_samples


def _positions(output: Tensor, target: Tensor) -> int:
    """Return T of a loss whose form is not known.

    Integer targets: one position for each target of a sample. Other targets: one position for each
    entry of the dimensions between the samples and the last dimension.
    """
    if not target.is_floating_point():
        return max(1, target.numel() // len(target))
    return math.prod(output.shape[1:-1])


def _squared_error_trace(output: Tensor, target: Tensor, gradient: Tensor) -> Tensor | None:
    """Return tr H if l = c |o - y|^2, and None for other losses.

    Then g = 2 c (o - y) and H = 2 c I.
    """
    if target.numel() != output.numel() or not target.is_floating_point():
        return None
    error = output.double() - target.reshape(output.shape).double()
    slope = (gradient * error).sum() / (error * error).sum()
    # Rounding of the difference and of its two terms. Targets far from zero must not make every
    # loss look like squared error.
    size = output.abs() + target.reshape(output.shape).abs()
    rounding = slope * (_TOLERANCE * error.abs() + 8 * torch.finfo(output.dtype).eps * size)
    if not bool(((gradient - slope * error).abs() <= rounding).all()):
        return None
    return slope.expand(len(output)) * (output.numel() // len(output))


def _trace(gradient: Tensor, leaf: Tensor) -> Tensor:
    """Return sum_k d g_ik / d o_ik of each sample, shape (B,).

    It is 0 if the loss is piecewise linear.
    """
    total = torch.zeros(len(leaf), dtype=torch.float64, device=leaf.device)
    if not gradient.requires_grad:
        return total
    size = leaf.numel() // len(leaf)
    exact = size <= EXACT_COORDINATES
    generator = torch.Generator().manual_seed(0)
    for k in range(size if exact else EXACT_COORDINATES):
        if exact:
            probe = torch.zeros(size).index_fill_(0, torch.tensor(k), 1.0)
        else:
            probe = torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1)
        directions = probe.to(leaf).reshape(leaf.shape[1:]).expand_as(leaf)
        (product,) = torch.autograd.grad(
            gradient, leaf, directions, retain_graph=True, allow_unused=True
        )
        if product is None:
            return total
        total += (product * directions).double().flatten(1).sum(1)
    return total if exact else total / EXACT_COORDINATES


def _classes(link: Link) -> int:
    return 1 if link == "softmax, classes second" else -1


def _as_float32(rho: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.minimum(rho, np.finfo(np.float32).max).astype(np.float32)
