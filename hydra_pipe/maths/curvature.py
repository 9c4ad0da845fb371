"""Curvature weights: how much of the loss's second derivative each row of the empirical Fisher stands for.

Symbols: o_i the model's output for sample i, l_i its loss, g_i = grad l_i and H_i = hess l_i in o_i, B samples in the step, T_i
*positions* of sample i: parts of its output whose losses are added up or averaged, such as the tokens of a text (1: one
classification). The Fisher |B| sum_i rho_i r_i r_i^T has, in the output's coordinates, the trace of one position's Hessian where

    rho_i = tr H_i / (T_i |g_i|^2)

The whole trace would be T times that. But the Hessian has it in T directions or more, and the Fisher in one, r_i: along it, and
that is all that the Fisher says, T times as much would be too much.

Where p = softmax(o) or sigmoid(o) and y the target, cross-entropy has g = p - y, and tr H = sum p (1 - p) either way. Such a loss
is known from its gradient alone: each element of g that is below zero belongs to y. Where the loss is c times that, or a sum of
such terms over positions, rho_i = sum tr H / (T c sum |p - y|^2).

A row that is zero stands for nothing: rho = 0.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.errors import PipelineError

# softmax over the last or the second dimension, or a sigmoid for each output
Link = Literal["softmax", "softmax, classes second", "sigmoid"]
LINKS: tuple[Link, ...] = ("softmax", "softmax, classes second", "sigmoid")

# Outputs of a sample up to which the Hessian's trace is found coordinate by coordinate; beyond them with as many random signs.
EXACT_COORDINATES = 256

# Of the difference between a gradient and the one that the closed form has: large logits are rounded by as much.
_TOLERANCE = 1e-4
# Of the largest gradient at a sample's output: what the loss, taken again, may differ by.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Loss = Callable[[Tensor, Tensor], Tensor]


def fits(link: Link, output: Tensor) -> bool:
    """Whether outputs of this shape may be what `link` is for."""
    if link == "sigmoid":
        return True
    return output.dim() > (2 if link == "softmax, classes second" else 1) and output.shape[_classes(link)] > 1


def cross_entropy_statistics(output: Tensor, gradient: Tensor, link: Link) -> Tensor:
    """What `cross_entropy_weights` needs to know of each sample, sums over its positions.

    Args:
        output: the model's, shape (B, ...).
        gradient: of the loss, whatever its reduction, at the output; the same shape.
        link: from output to p.

    Returns:
        tr H, |p - y|^2, (p - y) . g, |g|^2 and T, shape (B, 5), float64. Positions without a gradient (padding that
        the loss ignores) do not count.
    """
    batch = len(output)
    if link == "sigmoid":
        gradient = gradient.double()
        p = torch.sigmoid(output.double())
        residual = p - (gradient < 0).double()
        terms = torch.stack([p * (1 - p), residual * residual, residual * gradient, gradient * gradient, torch.ones_like(p)])
        return torch.where(gradient != 0, terms, 0.0).reshape(5, batch, -1).sum(2).T
    # (position, class); of the large arrays only products are taken, which are one pass each
    classes = output.shape[_classes(link)]
    gradient = gradient.movedim(_classes(link), -1).reshape(-1, classes)
    p = torch.softmax(output.movedim(_classes(link), -1).reshape(-1, classes), 1, dtype=torch.float64)
    g_y, target = gradient.min(1, keepdim=True)
    p_y = p.gather(1, target)[:, 0]
    gradient, g_y = gradient.double(), g_y[:, 0].double()
    square, product = _dot(p, p), _dot(p, gradient)
    # sum p (1 - p) = 1 - |p|^2; |p - y|^2 = |p|^2 - 2 p_y + 1
    one = torch.ones_like(g_y)
    terms = torch.stack([1 - square, square - 2 * p_y + 1, product - g_y, _dot(gradient, gradient), one])
    terms = torch.where(g_y != 0, terms, 0.0)
    return (terms if terms.shape[1] == batch else terms.reshape(5, batch, -1).sum(2)).T


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two matrices."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


def cross_entropy_weights(
    statistics: NDArray[np.float64], sizes: NDArray[np.int64], batches: NDArray[np.int64], eps: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """rho of the samples of some backward passes, and of which passes the loss is cross-entropy.

    Args:
        statistics: of all samples, one pass after the other, see `cross_entropy_statistics`.
        sizes: samples of each pass.
        batches: |B| of each pass, samples of the whole step, of which it may hold a part.
        eps: of the dtype that the gradients went through.

    Returns:
        Shape (B,), for rows that are gradients of their pass: a factor in its loss counts; and shape (pass,). Not known is a pass
        whose loss is not cross-entropy, or has a factor of its own for each sample, as a weighted or a focal loss has, and a
        pass of one sample, which shows no such thing.
    """
    starts = np.cumsum(sizes) - sizes
    trace, residual, product, square, positions = statistics.T
    with np.errstate(invalid="ignore", divide="ignore"):
        factors = np.add.reduceat(product, starts) / np.add.reduceat(residual, starts)
        factor = np.repeat(factors, sizes)
        # what is left of the gradients, in units of the factor: p is rounded, however near it is to the target
        left = np.sqrt(np.maximum(square - 2 * factor * product + factor**2 * residual, 0.0))
        good = left <= factor * max(_TOLERANCE, 4 * eps) * (1.0 + np.sqrt(residual))
        rho = np.where(residual > 0.0, trace / (positions * np.repeat(batches, sizes) * factor * residual), 0.0)
    known = (sizes > 1) & (factors > 0.0) & np.isfinite(factors) & np.logical_and.reduceat(good, starts)
    return _as_float32(rho), known


def curvature_weights(loss: Loss, output: Tensor, target: Tensor, gradient: Tensor, batch: int) -> NDArray[np.float32]:
    """rho of the samples of one backward pass, of any loss: squared error in closed form, others by derivatives of the loss.

    The trace is exact up to `EXACT_COORDINATES` outputs a sample; beyond that it is Hutchinson's unbiased estimate, which is
    exact as well where the Hessian is diagonal.

    Args:
        loss: (output, target) -> one loss for each sample, shape (B,).
        output: the model's, shape (B, ...).
        target: shape (B, ...).
        gradient: that arrived at the output, the shape of `output`: tells by what the loop has multiplied the losses.
        batch: |B|, samples of the whole step, of which the pass may hold a part.

    Returns:
        Shape (B,), for rows that are gradients of that pass; not a number where the gradient is not one of this loss, or the
        loss has no second derivative that autograd knows.

    Raises:
        PipelineError: the loss is not one for each sample.
    """
    output = output.detach().float() if output.dtype in (torch.float16, torch.bfloat16) else output.detach()
    leaf = output.clone().requires_grad_()
    with torch.enable_grad():
        losses = loss(leaf, target)
        if losses.shape != (len(output),):
            raise PipelineError(
                f"the loss has shape {tuple(losses.shape)} for a batch of {len(output)}: it must be one for each sample"
            )
        (own,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
    squares = own.detach().double().pow(2).flatten(1).sum(1)
    factor = (own.detach().double() * gradient.double()).sum() / squares.sum()
    left = (gradient.double() - factor * own.detach().double()).pow(2).flatten(1).sum(1).sqrt()
    if not bool((left <= factor * _ROUNDING[gradient.dtype] * squares.sqrt().max()).all()):
        return np.full(len(output), np.nan, np.float32)
    trace = _squared_error_trace(output, target, own.detach())
    positions = _positions(output, target) if trace is None else output.numel() // len(output)
    if trace is None:
        try:
            trace = _trace(own, leaf)
        except RuntimeError:  # what torch raises where it has no derivative
            return np.full(len(output), np.nan, np.float32)
    rho = torch.where(squares > 0, trace / (positions * batch * factor * squares), 0.0)
    return _as_float32(rho.cpu().numpy())


def _positions(output: Tensor, target: Tensor) -> int:
    """T of a loss that is not known by its form: a class for each, or all that lies between the samples and the last dimension."""
    if not target.is_floating_point():
        return max(1, target.numel() // len(target))
    return math.prod(output.shape[1:-1])


def _squared_error_trace(output: Tensor, target: Tensor, gradient: Tensor) -> Tensor | None:
    """tr H where l = c |o - y|^2, so that g = 2 c (o - y) and H = 2 c I; None: it is something else."""
    if target.numel() != output.numel() or not target.is_floating_point():
        return None
    error = output.double() - target.reshape(output.shape).double()
    slope = (gradient * error).sum() / (error * error).sum()
    # of the difference, and of what it is one of: targets far from zero must not make any loss look like this one
    size = output.abs() + target.reshape(output.shape).abs()
    rounding = slope * (_TOLERANCE * error.abs() + 8 * torch.finfo(output.dtype).eps * size)
    if not bool(((gradient - slope * error).abs() <= rounding).all()):
        return None
    return slope.expand(len(output)) * (output.numel() // len(output))


def _trace(gradient: Tensor, leaf: Tensor) -> Tensor:
    """sum_k d g_ik / d o_ik of each sample, shape (B,); 0 where the loss is piecewise linear."""
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
        (product,) = torch.autograd.grad(gradient, leaf, directions, retain_graph=True, allow_unused=True)
        if product is None:
            return total
        total += (product * directions).double().flatten(1).sum(1)
    return total if exact else total / EXACT_COORDINATES


def _classes(link: Link) -> int:
    return 1 if link == "softmax, classes second" else -1


def _as_float32(rho: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.minimum(rho, np.finfo(np.float32).max).astype(np.float32)
