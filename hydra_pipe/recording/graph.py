"""The autograd graph of one pass: which nodes use a parameter, and how each sample's gradient comes from there to the parameter.

A *route* begins at a node whose output keeps the samples apart and which has an input that all samples share: a
parameter, or something made of parameters alone (a transposed weight, an embedding of positions).
`hydra_pipe.per_sample.nodes` splits the node's gradient by sample; what lies between the input and the parameters, the
*chain*, is differentiated for all samples at once.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hydra_pipe.errors import LayerError
from hydra_pipe.per_sample.embedding import token_rows
from hydra_pipe.per_sample.factors import Contribution, Factors, Summed, TokenRows, bounds_of, rows_of
from hydra_pipe.per_sample.node_call import ByInput, NodeCall
from hydra_pipe.per_sample.nodes import gradients_by_sample
from hydra_pipe.per_sample.orders import FIRST, WHOLE, SampleOrder, order_of

# Nodes that only transpose a matrix, or change its dtype: factors pass through them as factors.
_TRANSPOSES = ("TBackward0", "TransposeBackward0")
_CASTS = ("ToCopyBackward0",)
_CHECKPOINT = "CheckpointFunctionBackward"

# Saved operands of nodes that multiply a parameter with data, and the inputs that they are.
_TIMES_DATA = {
    "MmBackward0": {"_saved_self": 0},
    "AddmmBackward0": {"_saved_mat1": 1},
    "BmmBackward0": {"_saved_self": 0},
    "MulBackward0": {"_saved_self": 0, "_saved_other": 1},
    "ConvolutionBackward0": {"_saved_input": 0},
}

# Nodes that may take samples to other places: always, along the first dimension, or by an index of it.
_ROUTING = ("MaskedSelectBackward0", "MaskedScatterBackward0", "TakeBackward0", "PutBackward0")
_ROUTING_BY_DIM = (
    *("IndexSelectBackward0", "IndexAddBackward0", "IndexCopyBackward0", "GatherBackward0"),
    *("ScatterBackward0", "ScatterAddBackward0", "SortBackward0", "TopkBackward0"),
)
_ROUTING_BY_INDEX = ("IndexBackward0", "IndexPutBackward0")

# Orders of the gradients at the outputs of a node, by the node's number.
Orders = dict[int, tuple[SampleOrder | None, ...]]


class Walk:
    """The nodes below the outputs of a pass, numbered in an order that is the same whenever the model does the same.

    Args:
        outputs: tensors of the pass, with a history.
        blocks: number of the block of each recorded parameter.
    """

    def __init__(self, outputs: Iterable[Tensor], blocks: Mapping[nn.Parameter, int]) -> None:
        self.nodes: list[Any] = []
        #: (input of the node, number of the node behind it, output of that node), by node
        self.inputs: list[list[tuple[int, int, int]]] = []
        #: block of each node that stands for a recorded parameter
        self.leaves: dict[int, int] = {}
        numbers: dict[Any, int] = {}
        names: list[Any] = []
        waiting = [x.grad_fn for x in outputs if x.grad_fn is not None]
        for node in waiting:
            self._number(node, numbers, names)
        done = 0
        while done < len(self.nodes):
            node, at_inputs = self.nodes[done], self.inputs[done]
            for slot, (below, output) in enumerate(node.next_functions):
                if below is not None:
                    at_inputs.append((slot, self._number(below, numbers, names), output))
            parameter = getattr(node, "variable", None) if not at_inputs else None
            if parameter is not None and parameter in blocks:
                self.leaves[done] = blocks[parameter]
            names.append(tuple(at_inputs))
            done += 1
        #: what tells this graph from another
        self.signature = hash((tuple(names), tuple(sorted(self.leaves.items()))))
        #: whether a part of the pass has no graph yet: reentrant checkpointing makes it in the backward pass
        self.is_checkpointed = _CHECKPOINT in names

    def routes_samples(self, batch: int) -> bool:
        """Tell whether activations are gathered or scattered by an index that may take samples to other places, step by step."""
        for node, at_inputs in zip(self.nodes, self.inputs, strict=True):
            name = node.name()
            if name in _ROUTING:
                return True
            if name in _ROUTING_BY_DIM and node._saved_dim == 0:
                return True
            if name in _ROUTING_BY_INDEX and not all(child in self.leaves for _, child, _ in at_inputs):
                first = node._saved_indices[0]
                if first is not None and not _keeps_places(first, batch):
                    return True
        return False

    def _number(self, node: Any, numbers: dict[Any, int], names: list[Any]) -> int:
        number = numbers.get(node)
        if number is None:
            number = numbers[node] = len(self.nodes)
            self.nodes.append(node)
            self.inputs.append([])
            names.append(node.name())
        return number

    def leading_to(self, wanted: frozenset[int], but_through: Collection[int] = ()) -> list[frozenset[int]]:
        """The blocks among `wanted` that each node leads to, by paths that do not go on through the nodes `but_through`."""
        nothing: frozenset[int] = frozenset()
        found = [nothing] * len(self.nodes)
        for number, block in self.leaves.items():
            if block in wanted:
                found[number] = frozenset((block,))
        for number in self.deepest_first():
            below = [found[child] for _, child, _ in self.inputs[number] if found[child] and child not in but_through]
            if below:
                found[number] = below[0] if len(below) == 1 else nothing.union(*below)
        return found

    def deepest_first(self) -> list[int]:
        """Numbers of the nodes, each after all that are behind it."""
        order: list[int] = []
        state = bytearray(len(self.nodes))
        for start in range(len(self.nodes)):
            stack = [start] if not state[start] else []
            while stack:
                number = stack[-1]
                if state[number] == 0:
                    state[number] = 1
                    stack += [child for _, child, _ in self.inputs[number] if state[child] == 0]
                else:
                    stack.pop()
                    if state[number] == 1:
                        state[number] = 2
                        order.append(number)
        return order


@dataclass(frozen=True, slots=True)
class Route:
    """One node that uses parameters for all samples.

    Args:
        node: number of the node in the walk.
        orders: where the gradients at its outputs keep their samples.
        blocks: that each of its shared inputs leads to, by the number of the input.
    """

    node: int
    orders: tuple[SampleOrder | None, ...]
    blocks: Mapping[int, frozenset[int]]


@dataclass(frozen=True)
class Plan:
    """How the gradients of some parameters are split in passes with one graph.

    Args:
        routes: to take.
        slow: blocks that no route leads to: one backward pass a sample, of the whole model, splits their gradients.
    """

    routes: Sequence[Route] = ()
    slow: frozenset[int] = frozenset()

    def without(self, blocks: frozenset[int]) -> "Plan":
        """The plan with `blocks` split slowly instead."""
        routes = []
        for route in self.routes:
            left = {slot: kept for slot, leads in route.blocks.items() if (kept := leads - blocks)}
            if left:
                routes.append(replace(route, blocks=left))
        return Plan(routes, self.slow | blocks)


def whole_plan(walk: Walk, wanted: frozenset[int]) -> Plan:
    """The plan of a batch of one: all is that sample's."""
    leads = walk.leading_to(wanted)
    routes = []
    for number, node in enumerate(walk.nodes):
        used = {slot: leads[child] for slot, child, _ in walk.inputs[number] if child in walk.leaves and leads[child]}
        if used:
            routes.append(Route(number, (WHOLE,) * len(node._input_metadata), used))
    return Plan(routes)


def _keeps_places(index: Tensor, batch: int) -> bool:
    """Tell whether an index of the first dimension takes each sample to its own place."""
    if index.dtype == torch.bool or index.dim() == 0 or len(index) != batch:
        return False
    places = torch.arange(batch, device=index.device).reshape(-1, *[1] * (index.dim() - 1))
    return bool((index == places).all())


def mixing_block(walk: Walk, probe: "OrderProbe", inputs: Sequence[Tensor], wanted: frozenset[int]) -> int | None:
    """A block that is used where the samples of a batch are mixed; None: there is none.

    A node has mixed samples behind it if it multiplies a parameter with data, and one row of its output is reached
    from two samples. All samples share what is no data: a mask, a table of positions, frozen weights.

    Args:
        walk, probe, wanted: see `plan_of`.
        inputs: of the model. Data are a part of one of them, or have as many elements, however they are arranged.
    """
    leads = walk.leading_to(wanted)
    sizes, places = {x.numel() for x in inputs}, {x.untyped_storage().data_ptr() for x in inputs}
    for number in probe.mixed:
        node = walk.nodes[number]
        shape = tuple(node._input_metadata[0].shape)
        if number not in probe.overlapping or node.name() not in _TIMES_DATA or len(shape) < 2 or not leads[number]:
            continue
        given = {slot for slot, *_ in walk.inputs[number]}
        for name, slot in _TIMES_DATA[node.name()].items():
            data = getattr(node, name, None)
            if slot in given or not isinstance(data, Tensor) or data.dim() < 2:
                continue
            if data.numel() in sizes or data.untyped_storage().data_ptr() in places:
                return min(leads[number])
    return None


def plan_of(walk: Walk, probe: "OrderProbe", wanted: frozenset[int]) -> Plan:
    """The routes to the blocks `wanted`: from each node that keeps the samples apart to inputs that do not.

    Args:
        walk: of the graph.
        probe: has seen the gradients of some samples.
        wanted: blocks.
    """
    leads = walk.leading_to(wanted)
    orders = probe.assumed_orders(leads)
    # what lies behind a node that keeps the samples apart is that node's own affair, also where a chain leads there
    leads = walk.leading_to(wanted, orders)
    routes: list[Route] = []
    reached: set[int] = set()
    for number, of_node in orders.items():
        shared = {slot: leads[child] for slot, child, _ in walk.inputs[number] if leads[child] and child not in orders}
        if shared:
            routes.append(Route(number, of_node, shared))
            reached |= set().union(*shared.values())
    twice = _also_through(walk, orders, [route.node for route in routes], wanted)
    return Plan(routes, wanted - reached).without(twice) if twice else Plan(routes, wanted - reached)


def _also_through(walk: Walk, orders: Orders, nodes: Iterable[int], wanted: frozenset[int]) -> frozenset[int]:
    """Blocks that a chain of one of `nodes` leads to by itself and through another node that keeps the samples apart."""
    directly, at_all = walk.leading_to(wanted, orders), walk.leading_to(wanted)
    through: list[frozenset[int]] = [frozenset()] * len(walk.nodes)
    for number in walk.deepest_first():
        below = [at_all[child] if child in orders else through[child] for _, child, _ in walk.inputs[number]]
        through[number] = frozenset().union(*below)
    found: frozenset[int] = frozenset()
    for number in nodes:
        for _, child, _ in walk.inputs[number]:
            if child not in orders:
                found |= directly[child] & through[child]
    return found


class OrderProbe:
    """Finds where the gradients at the nodes of a graph keep their samples, while gradients of one sample alone go through them.

    Args:
        walk: of the graph.
        batch: samples of the pass.
        wanted: blocks; only nodes that lead to one are watched.
    """

    def __init__(self, walk: Walk, batch: int, wanted: frozenset[int]) -> None:
        self._walk, self.batch, self._sample = walk, batch, 0
        self._orders: Orders = {}
        #: nodes that a gradient of one sample has reached in the rows of others
        self.mixed: set[int] = set()
        #: those of them of which one row was reached from two samples; and the rows that were reached
        self.overlapping: set[int] = set()
        self._rows: dict[int, Tensor] = {}
        leads = walk.leading_to(wanted)
        self._watched = [number for number in range(len(walk.nodes)) if leads[number] and number not in walk.leaves]
        self._handles = [walk.nodes[number].register_prehook(self._hook(number)) for number in self._watched]

    def look_at(self, sample: int) -> None:
        """The gradients that come next are of `sample`."""
        self._sample = sample

    @property
    def may_mix(self) -> bool:
        """Tell whether a node that multiplies a parameter with data was reached in the rows of several samples."""
        return any(self._walk.nodes[number].name() in _TIMES_DATA for number in self.mixed - self.overlapping)

    @property
    def is_complete(self) -> bool:
        """Tell whether a gradient has come through every node."""
        return all(number in self._orders or number in self.mixed for number in self._watched)

    def remove(self) -> None:
        """Leave the graph as it was."""
        for handle in self._handles:
            handle.remove()

    def assumed_orders(self, leads: Sequence[frozenset[int]]) -> Orders:
        """Orders at the nodes that keep the samples apart.

        A node that no gradient has come through (a branch that was dropped) is taken to keep them as the node that uses it does, if
        both have the samples first and as many entries.
        """
        found = {number: orders for number, orders in self._orders.items() if number not in self.mixed and leads[number]}
        for number in range(len(self._walk.nodes)):  # those that use a node come before the node
            if number not in found:
                continue
            for _, child, output in self._walk.inputs[number]:
                if child in found or child in self.mixed or child in self._walk.leaves or not leads[child]:
                    continue
                sizes = [tuple(x.shape) for x in self._walk.nodes[child]._input_metadata]
                own = [tuple(x.shape) for x in self._walk.nodes[number]._input_metadata]
                first = len(sizes) == 1 and sizes[output][:1] == own[0][:1] and found[number][0] == FIRST
                if first and sizes[output] and sizes[output][0] % self.batch == 0:
                    found[child] = (FIRST,)
        return found

    def _hook(self, number: int) -> Callable[[Sequence[Tensor | None]], None]:
        def hook(gradients: Sequence[Tensor | None]) -> None:
            before = self._orders.get(number) or (None,) * len(gradients)
            found = list(before)
            for place, gradient in enumerate(gradients):
                if gradient is None or not bool(gradient.any()):
                    continue
                usual = before[place]
                order = order_of(gradient.detach(), self.batch, self._sample, usual or FIRST)
                if order is None or (usual is not None and order != usual):
                    self.mixed.add(number)
                if gradient.dim() > 1:
                    rows = (gradient.detach() != 0).flatten(1).any(1)
                    if number in self._rows and len(rows) == len(self._rows[number]):
                        if bool((rows & self._rows[number]).any()):
                            self.overlapping.add(number)
                        rows = rows | self._rows[number]
                    self._rows[number] = rows
                found[place] = order
            if any(order is not None for order in found):
                self._orders[number] = tuple(found)

        return hook


@dataclass(frozen=True, slots=True)
class RouteCall:
    """A route that is taken in one pass.

    Args:
        route: to take.
        parameters: of the blocks.
        batch: samples of the pass.
    """

    route: Route
    parameters: Sequence[nn.Parameter]
    batch: int

    @property
    def blocks(self) -> list[int]:
        """All that the route leads to."""
        return sorted(set().union(*self.route.blocks.values()))

    def rows(self, node: Any, gradients: Sequence[Tensor | None]) -> list[tuple[int, Contribution]]:
        """Contributions of the pass's samples to the blocks of the route, each with its block.

        Args:
            node: that is about to run backward.
            gradients: at its outputs.

        Raises:
            LayerError: a gradient has another shape than the one that was probed, or the node cannot be split.
        """
        orders: list[SampleOrder | None] = []
        for place, gradient in enumerate(gradients):
            order = self.route.orders[place] if place < len(self.route.orders) else None
            if gradient is not None and (order is None or not order.fits(gradient, self.batch)):
                raise LayerError(
                    f"a gradient of shape {tuple(gradient.shape)} in a batch of {self.batch} keeps its samples elsewhere than "
                    f"in the "
                    f"first step ({node.name()}): freeze the parameters behind it, or use a batch of one"
                )
            orders.append(None if gradient is None else order)
        below = node.next_functions
        shapes = {slot: _shape_behind(*below[slot]) for slot in self.route.blocks}
        call = NodeCall(node, [None if g is None else g.detach() for g in gradients], orders, self.batch, shapes)
        try:
            at_inputs = gradients_by_sample(call)
            found: list[tuple[int, Contribution]] = []
            for slot, blocks in self.route.blocks.items():
                found += self._through_chain(below[slot], at_inputs[slot], shapes[slot], blocks)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise LayerError(
                f"the gradient of {node.name()} cannot be split by sample ({str(error).splitlines()[0][:200]}): freeze the "
                f"parameters "
                f"behind it, or use a batch of one"
            ) from error
        return found

    def _through_chain(
        self, edge: tuple[Any, int], value: ByInput, shape: tuple[int, ...], blocks: frozenset[int]
    ) -> list[tuple[int, Contribution]]:
        """From each sample's gradient at an input that all share to its gradients of the parameters that the input is made of."""
        node, is_turned = edge[0], False
        while len(shape) == 2 and node.name() in (*_TRANSPOSES, *_CASTS):
            is_turned ^= node.name() in _TRANSPOSES
            node = node.next_functions[0][0]
        if getattr(node, "variable", None) is not None and len(blocks) == 1:
            (block,) = blocks
            return [(block, _turned(value, shape, self.parameters[block]) if is_turned else _cast(value, self.parameters[block]))]
        rows = rows_of(value)
        if edge[0].name() == "EmbeddingBackward0" and getattr(edge[0].next_functions[0][0], "variable", None) is not None:
            (block,) = blocks
            indices = edge[0]._saved_indices.reshape(1, -1).expand(len(rows), -1)
            values = rows.reshape(len(rows), -1, shape[-1]).to(self.parameters[block].dtype)
            return [(block, token_rows(indices, values, len(self.parameters[block]), edge[0]._saved_padding_idx))]
        wanted = sorted(blocks)
        parameters = [self.parameters[block] for block in wanted]
        # a gradient at random beside those of the samples shows by how much the chain stretches: of terms that cancel in it
        # (a bias before a softmax) nothing but rounding is left, and only their size tells that it is no more
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
    """Contributions of the node that runs to the parameters that it uses itself, each with its block. See `RouteCall.rows`."""
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
    return tuple(variable.shape) if variable is not None else tuple(node._input_metadata[output].shape)


def _turned(value: ByInput, shape: tuple[int, ...], parameter: nn.Parameter) -> Contribution:
    """Rows of a transposed matrix as rows of the matrix."""
    if isinstance(value, Factors) and isinstance(value.given_right, Tensor):
        return Factors(value.given_right.to(parameter.dtype), value.left.to(parameter.dtype))
    rows = rows_of(value)
    turned = rows.reshape(len(rows), *shape).transpose(1, 2).reshape(len(rows), -1).to(parameter.dtype)
    return Summed(turned, value.bounds.to(parameter.dtype)) if isinstance(value, Summed) else turned


def _cast(value: ByInput, parameter: nn.Parameter) -> Contribution:
    dtype = parameter.dtype
    if isinstance(value, Factors):
        right = value.given_right
        return Factors(value.left.to(dtype), right.to(dtype) if isinstance(right, Tensor) else right, value.beside)
    if isinstance(value, TokenRows):
        return TokenRows(value.tokens, value.values.to(dtype), value.n_lines)
    if isinstance(value, Summed):
        return Summed(value.rows.to(dtype), value.bounds.to(dtype))
    return value.to(dtype)


def _pulled_back(edge: tuple[Any, int], gradients: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Gradients of `parameters`, one row a sample, from one gradient a sample at the output `edge` of a node."""
    output = torch.autograd.graph.GradientEdge(*edge)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    found: list[Tensor | None]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that are taken sample by sample
            found = [*torch.autograd.grad([output], parameters, [gradients], is_grads_batched=True, **options)]
    except RuntimeError:  # an operation that torch cannot take for several samples at once
        singly = [torch.autograd.grad([output], parameters, [one], **options) for one in gradients]
        found = [None if of_one[0] is None else torch.stack(of_one) for of_one in zip(*singly, strict=True)]
    return [None if g is None else g.detach().reshape(len(gradients), -1) for g in found]


def gradients_of(model: nn.Module, total: Tensor, wanted: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """Gradients of a scalar, whatever checkpointing `model` uses; `.grad` is as before."""
    walk = Walk([total], {})
    if walk.is_checkpointed:
        return gradients_by_backward(walk, model, [total], [torch.ones_like(total)], wanted)
    return torch.autograd.grad(total, list(wanted), allow_unused=True)


def gradients_by_backward(
    walk: Walk, model: nn.Module, outputs: Sequence[Tensor], gradients: Sequence[Tensor], wanted: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """Gradients by way of `.grad`, which is put back: reentrant checkpointing knows no other. The graph is kept."""
    found = {getattr(node, "variable", None) for node in walk.nodes}
    leaves = list({*model.parameters(), *(x for x in found if x is not None)})
    kept = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(outputs, gradients, retain_graph=True)
        return [parameter.grad for parameter in wanted]
    finally:
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient
