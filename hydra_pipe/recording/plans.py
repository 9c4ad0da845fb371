"""Routes through the graph of a pass: which nodes to take the gradients of parameters from.

A *route* begins at a node whose output keeps the samples apart and which has an input that all samples share: a
parameter, or something made of parameters alone (a transposed weight, an embedding of positions).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hydra_pipe.per_sample.orders import WHOLE, SampleOrder
from hydra_pipe.recording.node_orders import OrderProbe, Orders
from hydra_pipe.recording.walk import Walk


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


def plan_of(walk: Walk, probe: OrderProbe, wanted: frozenset[int]) -> Plan:
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
