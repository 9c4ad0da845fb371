"""Samples on which single entries within a loss depend.

The second derivative of a loss does not show all that mixes samples. A hinge of two samples' scores
has none, and torch knows none for some operations, such as a matrix of distances. So the graph of
the loss is looked at too. From the loss down, linear operations may join samples: a loss is a sum.
The first operation that is not linear must not join them. Each entry of its result must depend on
the outputs of one sample alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from hydra_pipe.recording.places import Origin, Pass

# Nodes that are linear in all of their inputs, without the number at the end of a name.
_LINEAR = frozenset(
    f"{name}Backward"
    for name in (
        *("Add", "Sub", "Rsub", "Neg", "Sum", "Mean", "Nansum", "Cumsum", "Trace", "Stack", "Cat"),
        *("View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Clone", "ToCopy", "Copy"),
        *("Expand", "Repeat", "Squeeze", "Unsqueeze", "T", "Transpose", "Permute", "Flip", "Roll"),
        *("Select", "Slice", "Split", "SplitWithSizes", "Unbind", "Unfold", "Diagonal", "Take"),
        *("Index", "IndexSelect", "IndexAdd", "IndexPut", "IndexCopy", "Gather", "Scatter"),
        *("ScatterAdd", "MaskedSelect", "MaskedFill", "MaskedScatter", "Where", "Tril", "Triu"),
        *("SelectScatter", "SliceScatter", "ConstantPadNd", "SegmentReduce", "IndexFill"),
    )
)
# Nodes that are linear if only one of their inputs has a history; of a quotient the first one.
_PRODUCTS = frozenset(
    f"{name}Backward" for name in ("Mul", "Mm", "Bmm", "Mv", "Dot", "Addmm", "Addmv", "Baddbmm")
)
_QUOTIENT = "DivBackward"

# Entries of one result that are looked at.
_ENTRIES = 6

# (node, number of one of its outputs)
_Edge = tuple[Any, int]


def mixing_place(total: Tensor, outputs: Sequence[tuple[Origin, Pass]]) -> int | None:
    """Return the place of a sample that an entry of a loss depends on beside others.

    Args:
        total: the loss, a scalar. Its graph is kept.
        outputs: outputs that the loss may come from, with the places of their samples, and the
            pass of each output.

    Returns:
        The place in the step; None if each of the entries looked at depends on one sample.
    """
    edges, _ = _first_nonlinear(total, outputs)
    if not edges:
        return None
    gradients = torch.autograd.grad(
        total, [GradientEdge(*edge) for edge in edges], retain_graph=True, allow_unused=True
    )
    samples = {
        of_pass.first + k: int(sample)
        for _, of_pass in outputs
        for k, sample in enumerate(of_pass.samples)
    }
    for edge, gradient in zip(edges, gradients, strict=True):
        if gradient is None:
            continue
        active = gradient.flatten().nonzero()[:, 0]
        for number in range(min(_ENTRIES, len(active))):
            entry = active[number * len(active) // _ENTRIES if len(active) > _ENTRIES else number]
            alone = torch.zeros_like(gradient).flatten()
            alone[entry] = 1.0
            reached = _reached_places(edge, alone.reshape(gradient.shape), outputs)
            if len({samples[place] for place in reached}) > 1:
                return min(reached)
    return None


def reached_directly(
    losses: Sequence[Tensor], outputs: Sequence[tuple[Origin, Pass]]
) -> list[tuple[Origin, Pass]]:
    """Return the outputs that losses are taken of, without other outputs in between."""
    ends = _edges_of(outputs)
    waiting: list[_Edge] = [(x.grad_fn, x.output_nr) for x in losses if x.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node, output = waiting.pop()
        if (node, output) in ends:
            continue
        for edge in node.next_functions:
            if edge[0] is not None and edge not in seen:
                seen.add(edge)
                waiting.append(edge)
    return [one for one in outputs if _edges_of([one]) <= seen]


def is_opaque(total: Tensor, outputs: Sequence[tuple[Origin, Pass]]) -> bool:
    """Tell whether one function of the loop's own, or compiled code, makes the loss of the outputs.

    Entries within such a function cannot be looked at.
    """
    return any(isinstance(node, BackwardCFunction) for node in _first_nonlinear(total, outputs)[1])


def _first_nonlinear(
    total: Tensor, outputs: Sequence[tuple[Origin, Pass]]
) -> tuple[list[_Edge], list[Any]]:
    """Return the results of the first operations below `total` that are not linear.

    Results of one element are passed by: a function of the sum of all losses may be the loss.

    Returns:
        The results, and the nodes that were passed by.
    """
    ends = _edges_of(outputs)
    waiting: list[_Edge] = [(total.grad_fn, total.output_nr)]
    seen, found, passed = set(waiting), [], []
    while waiting:
        node, output = waiting.pop()
        size = node._input_metadata[output].shape if node._input_metadata else ()
        if torch.Size(size).numel() > 1 and not _is_linear(node):
            found.append((node, output))
            continue
        passed.append(node)
        for edge in node.next_functions:
            if edge[0] is not None and edge not in seen and edge not in ends:
                seen.add(edge)
                waiting.append(edge)
    return found, passed


def _edges_of(outputs: Sequence[tuple[Origin, Pass]]) -> set[_Edge]:
    return {(origin.output.grad_fn, origin.output.output_nr) for origin, _ in outputs}


def _is_linear(node: Any) -> bool:
    name = node.name().rstrip("0123456789")
    has_history = [below is not None for below, _ in node.next_functions]
    if name == _QUOTIENT:
        return has_history[0] and not any(has_history[1:])
    return name in _LINEAR or (name in _PRODUCTS and sum(has_history) == 1)


def _reached_places(
    edge: _Edge, gradient: Tensor, outputs: Sequence[tuple[Origin, Pass]]
) -> set[int]:
    """Return the places of the samples whose outputs a gradient at `edge` reaches."""
    found = torch.autograd.grad(
        [GradientEdge(*edge)],
        [origin.output for origin, _ in outputs],
        [gradient],
        retain_graph=True,
        allow_unused=True,
    )
    places: set[int] = set()
    for (origin, of_pass), g in zip(outputs, found, strict=True):
        if g is not None:
            values = origin.order.split(g.detach(), of_pass.count)
            # what is not finite tells nothing, and is refused by its own name
            rows = ((values != 0) & values.isfinite()).flatten(1).any(1)
            places |= {of_pass.first + row for row in rows.nonzero()[:, 0].tolist()}
    return places
