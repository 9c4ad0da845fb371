"""Contributions from one node of the graph: sample gradients at a shared input, then parameters.

`hydra_pipe.per_sample.nodes` splits the node's gradient by sample, at an input that all samples
share. The *chain* is the part of the graph between this input and the parameters. It is
differentiated for all samples at once.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hydra_pipe.errors import LayerError
from hydra_pipe.per_sample.embedding import token_rows
from hydra_pipe.per_sample.factors import (
    Contribution,
    Factors,
    Summed,
    TokenRows,
    bounds_of,
    rows_of,
)
from hydra_pipe.per_sample.node_call import ByInput, NodeCall
from hydra_pipe.per_sample.nodes import gradients_by_sample
from hydra_pipe.per_sample.orders import SampleOrder
from hydra_pipe.recording.plans import Route

# Nodes that only transpose a matrix, or change its dtype: factors pass through them as factors.
_TRANSPOSES = ("TBackward0", "TransposeBackward0")
_CASTS = ("ToCopyBackward0",)


@dataclass(frozen=True, slots=True)
class RouteCall:
    """A route that is taken in one pass.

    Args:
        route: route to take.
        parameters: parameters of the blocks.
        batch: samples of the pass.
    """

    route: Route
    parameters: Sequence[nn.Parameter]
    batch: int

    @property
    def blocks(self) -> list[int]:
        """All blocks that the route leads to."""
        return sorted(set().union(*self.route.blocks.values()))

    def rows(self, node: Any, gradients: Sequence[Tensor | None]) -> list[tuple[int, Contribution]]:
        """Return the contributions of the pass's samples to the route's blocks, with the blocks.

        Args:
            node: node that is about to run backward.
            gradients: gradients at the node's outputs.

        Raises:
            LayerError: a gradient has another shape than the one that was probed, or the node
                cannot be split.
        """
        orders: list[SampleOrder | None] = []
        for place, gradient in enumerate(gradients):
            order = self.route.orders[place] if place < len(self.route.orders) else None
            if gradient is not None and (order is None or not order.fits(gradient, self.batch)):
                raise LayerError(
                    f"a gradient of shape {tuple(gradient.shape)} in a batch of {self.batch} has "
                    f"its samples in another dimension than in the first step ({node.name()}): "
                    "freeze the parameters behind it, or use a batch of one"
                )
            orders.append(None if gradient is None else order)
        below = node.next_functions
        shapes = {slot: _shape_behind(*below[slot]) for slot in self.route.blocks}
        call = NodeCall(
            node, [None if g is None else g.detach() for g in gradients], orders, self.batch, shapes
        )
        try:
            at_inputs = gradients_by_sample(call)
            found: list[tuple[int, Contribution]] = []
            for slot, blocks in self.route.blocks.items():
                found += self._through_chain(below[slot], at_inputs[slot], shapes[slot], blocks)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise LayerError(
                f"the gradient of {node.name()} cannot be split by sample "
                f"({str(error).splitlines()[0][:200]}): freeze the "
                f"parameters "
                f"behind it, or use a batch of one"
            ) from error
        return found

    def _through_chain(
        self, edge: tuple[Any, int], value: ByInput, shape: tuple[int, ...], blocks: frozenset[int]
    ) -> list[tuple[int, Contribution]]:
        """Return the parameters' sample gradients, from the sample gradients at a shared input.

        The input is made of these parameters.
        """
        node, is_turned = edge[0], False
        while len(shape) == 2 and node.name() in (*_TRANSPOSES, *_CASTS):
            is_turned ^= node.name() in _TRANSPOSES
            node = node.next_functions[0][0]
        if getattr(node, "variable", None) is not None and len(blocks) == 1:
            (block,) = blocks
            return [
                (
                    block,
                    _turned(value, shape, self.parameters[block])
                    if is_turned
                    else _cast(value, self.parameters[block]),
                )
            ]
        rows = rows_of(value)
        if (
            edge[0].name() == "EmbeddingBackward0"
            and getattr(edge[0].next_functions[0][0], "variable", None) is not None
        ):
            (block,) = blocks
            indices = edge[0]._saved_indices.reshape(1, -1).expand(len(rows), -1)
            values = rows.reshape(len(rows), -1, shape[-1]).to(self.parameters[block].dtype)
            return [
                (
                    block,
                    token_rows(
                        indices, values, len(self.parameters[block]), edge[0]._saved_padding_idx
                    ),
                )
            ]
        wanted = sorted(blocks)
        parameters = [self.parameters[block] for block in wanted]
        # A random gradient beside those of the samples shows how much the chain stretches. Terms
        # may cancel in the chain (a bias before a softmax): only rounding is left, and only the
        # size of the terms tells that it is rounding.
        random = torch.randn(1, rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
        gradients = _pulled_back(edge, torch.cat([rows, random]).reshape(-1, *shape), parameters)
        bounds = bounds_of(value) / torch.linalg.vector_norm(random)
        return [
            (block, Summed(g[:-1], bounds.to(g) * torch.linalg.vector_norm(g[-1])))
            for block, g in zip(wanted, gradients, strict=True)
            if g is not None
        ]


def rows_at_node(
    node: Any, gradient: Tensor, order: SampleOrder, batch: int, blocks: Mapping[nn.Parameter, int]
) -> list[tuple[int, Contribution]]:
    """Return the contributions of the running node to its own parameters, each with its block.

    See `RouteCall.rows`.
    """
    used = {}
    for slot, (below, _) in enumerate(node.next_functions):
        while below is not None and below.name() in (*_TRANSPOSES, *_CASTS):
            below = below.next_functions[0][0]
        block = blocks.get(getattr(below, "variable", None))  # type: ignore[arg-type] # there is no block of None
        if block is not None:
            used[slot] = frozenset((block,))
    return RouteCall(Route(0, (order,), used), list(blocks), batch).rows(node, [gradient])


def _shape_behind(node: Any, output: int) -> tuple[int, ...]:
    variable = getattr(node, "variable", None)
    return (
        tuple(variable.shape) if variable is not None else tuple(node._input_metadata[output].shape)
    )


def _turned(value: ByInput, shape: tuple[int, ...], parameter: nn.Parameter) -> Contribution:
    """Turn rows of a transposed matrix into rows of the matrix."""
    if isinstance(value, Factors) and isinstance(value.given_right, Tensor):
        return Factors(value.given_right.to(parameter.dtype), value.left.to(parameter.dtype))
    rows = rows_of(value)
    turned = (
        rows.reshape(len(rows), *shape).transpose(1, 2).reshape(len(rows), -1).to(parameter.dtype)
    )
    return Summed(turned, value.bounds.to(parameter.dtype)) if isinstance(value, Summed) else turned


def _cast(value: ByInput, parameter: nn.Parameter) -> Contribution:
    dtype = parameter.dtype
    if isinstance(value, Factors):
        right = value.given_right
        return Factors(
            value.left.to(dtype),
            right.to(dtype) if isinstance(right, Tensor) else right,
            value.beside,
        )
    if isinstance(value, TokenRows):
        return TokenRows(value.tokens, value.values.to(dtype), value.n_lines)
    if isinstance(value, Summed):
        return Summed(value.rows.to(dtype), value.bounds.to(dtype))
    return value.to(dtype)


def _pulled_back(
    edge: tuple[Any, int], gradients: Tensor, parameters: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """Pull one gradient a sample at the output `edge` of a node back to `parameters`.

    Returns:
        Gradients of `parameters`, one row a sample; None for a parameter without a gradient.
    """
    output = torch.autograd.graph.GradientEdge(*edge)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    found: list[Tensor | None]
    try:
        with warnings.catch_warnings():
            # torch warns of operations that it takes sample by sample
            warnings.simplefilter("ignore")
            found = [
                *torch.autograd.grad(
                    [output], parameters, [gradients], is_grads_batched=True, **options
                )
            ]
    except RuntimeError:  # torch cannot take some operation for several samples at once
        singly = [torch.autograd.grad([output], parameters, [one], **options) for one in gradients]
        found = [
            None if of_one[0] is None else torch.stack(of_one)
            for of_one in zip(*singly, strict=True)
        ]
    return [None if g is None else g.detach().reshape(len(gradients), -1) for g in found]
