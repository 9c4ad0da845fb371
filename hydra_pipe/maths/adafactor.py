"""Adafactor's update (Shazeer and Stern 2018), as torch.optim.Adafactor has it.

Symbols: theta the parameter, g its gradient, t the number of the update, counted from 1. The second
moment of a matrix is kept as the means R of its rows and C of its columns. Other parameters have
theirs elementwise.

    beta = 1 - t^decay,   V = R C / mean(R),   U = g / max(sqrt(V), eps1)
    theta = theta - max(eps2, rms(theta)) min(lr, 1 / sqrt(t)) U / max(1, rms(U) / d)
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Names in the optimiser's state of the means of rows and columns, and of the elementwise moment.
ROWS, COLUMNS, ELEMENTS = "row_var", "col_var", "variance"


def state_shapes(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the second moment's tensors by name, for a parameter of `shape`."""
    if len(shape) < 2:
        return {ELEMENTS: tuple(shape)}
    *before, rows, columns = shape
    return {ROWS: (*before, rows, 1), COLUMNS: (*before, 1, columns)}


def averaged(moments: Mapping[str, Tensor], g: Tensor, share: float) -> dict[str, Tensor]:
    """Return the second moment after a step.

    Args:
        moments: second moment before the step, by name.
        g: gradient.
        share: 1 - beta of the step.
    """
    square = g.square()
    means = {
        ROWS: square.mean(-1, keepdim=True) if g.dim() > 1 else square,
        COLUMNS: square.mean(-2, keepdim=True) if g.dim() > 1 else square,
        ELEMENTS: square,
    }
    return {name: moment.lerp(means[name], share) for name, moment in moments.items()}


def second_moment(moments: Mapping[str, Tensor], eps1: float) -> Tensor:
    """Return V, the shape of the parameter."""
    if ELEMENTS in moments:
        return moments[ELEMENTS]
    rows = moments[ROWS]
    return (rows @ moments[COLUMNS]) / rows.mean(-2, keepdim=True).clamp(min=eps1)


def divided(g: Tensor, moment: Tensor, eps1: float) -> Tensor:
    """Return U."""
    return g * moment.clamp(min=eps1 * eps1).rsqrt()


def relative_size(theta: Tensor, u: Tensor, eps2: float, clip: float) -> Tensor:
    """Return max(eps2, rms(theta)) / max(1, rms(U) / d), a scalar. `clip` is d."""
    return _rms(theta).clamp(min=eps2) / (_rms(u) / clip).clamp(min=1.0)


def _rms(x: Tensor) -> Tensor:
    root: Tensor = torch.linalg.vector_norm(x) / x.numel() ** 0.5
    return root
