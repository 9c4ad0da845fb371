"""Routes through the graph of a pass: the nodes at which to split the gradients of parameters.

A *route* begins at a node whose output keeps the samples apart and which has an input that all
samples share. A shared input is a parameter, or is made of parameters alone (a transposed weight,
an embedding of positions).
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
        orders: orders of the samples in the gradients at the node's outputs.
        blocks: blocks that each shared input leads to, by the number of the input.
    """

    node: int
    orders: tuple[SampleOrder | None, ...]
    blocks: Mapping[int, frozenset[int]]


@dataclass(frozen=True)
class Plan:
    """The ways in which parameters' gradients are split, for passes with one graph.

    Args:
        routes: routes to take.
        slow: blocks that no route leads to. One backward pass a sample, through the whole model,
            splits their gradients.
    """

    routes: Sequence[Route] = ()
    slow: frozenset[int] = frozenset()

    @property
    def routed(self) -> set[int]:
        """Blocks that routes lead to."""
        return {
            block for route in self.routes for leads in route.blocks.values() for block in leads
        }

    def without(self, blocks: frozenset[int]) -> "Plan":
        """Return the plan in which `blocks` are split the slow way."""
        routes = []
        for route in self.routes:
            left = {slot: kept for slot, leads in route.blocks.items() if (kept := leads - blocks)}
            if left:
                routes.append(replace(route, blocks=left))
        return Plan(routes, self.slow | blocks)


def whole_plan(walk: Walk, wanted: frozenset[int]) -> Plan:
    """Return the plan for a batch of one: every gradient belongs to the one sample."""
    leads = walk.leading_to(wanted)
    routes = []
    for number, node in enumerate(walk.nodes):
        used = {
            slot: leads[child]
            for slot, child, _ in walk.inputs[number]
            if child in walk.leaves and leads[child]
        }
        if used:
            routes.append(Route(number, (WHOLE,) * len(node._input_metadata), used))
    return Plan(routes)


def plan_of(walk: Walk, probe: OrderProbe, wanted: frozenset[int]) -> Plan:
    """Return the routes to the blocks `wanted`.

    A route goes from a node that keeps the samples apart to an input that does not.

    Args:
        walk: the graph's nodes.
        probe: probe after the gradients of some samples.
        wanted: numbers of the blocks.
    """
    leads = walk.leading_to(wanted)
    orders = probe.assumed_orders(leads)
    # Blocks behind a node that keeps the samples apart belong to this node's own routes, even if a
    # chain leads there.
    leads = walk.leading_to(wanted, orders)
    routes: list[Route] = []
    reached: set[int] = set()
    for number, of_node in orders.items():
        shared = {
            slot: leads[child]
            for slot, child, _ in walk.inputs[number]
            if leads[child] and child not in orders
        }
        if shared:
            routes.append(Route(number, of_node, shared))
            reached |= set().union(*shared.values())
    twice = _also_through(walk, orders, [route.node for route in routes], wanted)
    return (
        Plan(routes, wanted - reached).without(twice) if twice else Plan(routes, wanted - reached)
    )


def _also_through(
    walk: Walk, orders: Orders, nodes: Iterable[int], wanted: frozenset[int]
) -> frozenset[int]:
    """Return the blocks that a chain of one of `nodes` reaches in two ways.

    One way is direct. The other goes through a further node that keeps the samples apart.
    """
    directly, at_all = walk.leading_to(wanted, orders), walk.leading_to(wanted)
    through: list[frozenset[int]] = [frozenset()] * len(walk.nodes)
    for number in walk.deepest_first():
        below = [
            at_all[child] if child in orders else through[child]
            for _, child, _ in walk.inputs[number]
        ]
        through[number] = frozenset().union(*below)
    found: frozenset[int] = frozenset()
    for number in nodes:
        for _, child, _ in walk.inputs[number]:
            if child not in orders:
                found |= directly[child] & through[child]
    return found
