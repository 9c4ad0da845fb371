"""The place of a batch's samples at the nodes of a graph, and the nodes that mix samples."""

from collections.abc import Callable, Sequence

from torch import Tensor

from hydra_pipe.per_sample.orders import FIRST, SampleOrder, order_of
from hydra_pipe.recording.addresses import storage_of
from hydra_pipe.recording.walk import Walk

# Nodes that multiply a parameter with data: the saved operands, each with its number among the
# node's inputs.
_TIMES_DATA = {
    "MmBackward0": {"_saved_self": 0},
    "AddmmBackward0": {"_saved_mat1": 1},
    "BmmBackward0": {"_saved_self": 0},
    "MulBackward0": {"_saved_self": 0, "_saved_other": 1},
    "ConvolutionBackward0": {"_saved_input": 0},
}

# Orders of the gradients at a node's outputs, by the node's number.
Orders = dict[int, tuple[SampleOrder | None, ...]]


class OrderProbe:
    """Finds where the gradients at a graph's nodes keep their samples.

    To this end, gradients of one sample alone are sent through the graph.

    Args:
        walk: the graph's nodes.
        batch: samples of the pass.
        wanted: numbers of blocks; only nodes that lead to one of them are watched.
    """

    def __init__(self, walk: Walk, batch: int, wanted: frozenset[int]) -> None:
        self._walk, self.batch, self._sample = walk, batch, 0
        self._orders: Orders = {}
        #: nodes that a gradient of one sample has reached in the rows of others
        self.mixed: set[int] = set()
        #: mixed nodes with a row that was reached from two samples; and the reached rows of each
        #: node
        self.overlapping: set[int] = set()
        self._rows: dict[int, Tensor] = {}
        leads = walk.leading_to(wanted)
        self._watched = [
            number
            for number in range(len(walk.nodes))
            if leads[number] and number not in walk.leaves
        ]
        self._handles = [
            walk.nodes[number].register_prehook(self._hook(number)) for number in self._watched
        ]

    def look_at(self, sample: int) -> None:
        """Announce that the next gradients are those of `sample`."""
        self._sample = sample

    @property
    def may_mix(self) -> bool:
        """Tell whether a node that multiplies a parameter with data may mix samples.

        Such a node was reached in the rows of several samples.
        """
        return any(
            self._walk.nodes[number].name() in _TIMES_DATA
            for number in self.mixed - self.overlapping
        )

    @property
    def is_complete(self) -> bool:
        """Tell whether a gradient has come through every node."""
        return all(number in self._orders or number in self.mixed for number in self._watched)

    def remove(self) -> None:
        """Leave the graph as it was."""
        for handle in self._handles:
            handle.remove()

    def assumed_orders(self, leads: Sequence[frozenset[int]]) -> Orders:
        """Return the orders at the nodes that keep the samples apart.

        A node may have received no gradient, such as in a branch that was dropped. Its order is
        then taken to be that of the node that uses it. This needs both to have the samples first
        and to have the same number of entries.

        Args:
            leads: blocks that each node leads to, by the node's number.
        """
        found = {
            number: orders
            for number, orders in self._orders.items()
            if number not in self.mixed and leads[number]
        }
        for number in range(len(self._walk.nodes)):  # the users of a node come before the node
            if number not in found:
                continue
            for _, child, output in self._walk.inputs[number]:
                if (
                    child in found
                    or child in self.mixed
                    or child in self._walk.leaves
                    or not leads[child]
                ):
                    continue
                sizes = [tuple(x.shape) for x in self._walk.nodes[child]._input_metadata]
                own = [tuple(x.shape) for x in self._walk.nodes[number]._input_metadata]
                first = (
                    len(sizes) == 1
                    and sizes[output][:1] == own[0][:1]
                    and found[number][0] == FIRST
                )
                if first and sizes[output] and sizes[output][0] % self.batch == 0:
                    found[child] = (FIRST,)
        return found

    def _hook(self, number: int) -> Callable[[Sequence[Tensor | None]], None]:
        def hook(gradients: Sequence[Tensor | None]) -> None:
            before = self._orders.get(number) or (None,) * len(gradients)
            found = list(before)
            for place, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                reached = gradient.detach() != 0
                if not bool(reached.any()):
                    continue
                usual = before[place]
                order = order_of(reached, self.batch, self._sample, usual or FIRST)
                if order is None or (usual is not None and order != usual):
                    self.mixed.add(number)
                if gradient.dim() > 1:
                    rows = reached.flatten(1).any(1)
                    if number in self._rows and len(rows) == len(self._rows[number]):
                        if bool((rows & self._rows[number]).any()):
                            self.overlapping.add(number)
                        rows = rows | self._rows[number]
                    self._rows[number] = rows
                found[place] = order
            if any(order is not None for order in found):
                self._orders[number] = tuple(found)

        return hook


def mixing_block(
    walk: Walk, probe: OrderProbe, inputs: Sequence[Tensor], wanted: frozenset[int]
) -> int | None:
    """Return a block that is used where the samples of a batch are mixed; None if there is none.

    A node has mixed samples behind it if it multiplies a parameter with data, and one row of its
    output is reached from two samples. Tensors that are not data are shared by all samples: a mask,
    a table of positions, frozen weights.

    Args:
        walk: the graph's nodes.
        probe: probe after the gradients of some samples.
        inputs: inputs of the model. A tensor counts as data if it is a part of an input, or has as
            many elements as one, however they are arranged.
        wanted: numbers of the recorded blocks.
    """
    leads = walk.leading_to(wanted)
    sizes, places = {x.numel() for x in inputs}, {storage_of(x) for x in inputs}
    for number in probe.mixed:
        node = walk.nodes[number]
        shape = tuple(node._input_metadata[0].shape)
        if (
            number not in probe.overlapping
            or node.name() not in _TIMES_DATA
            or len(shape) < 2
            or not leads[number]
        ):
            continue
        given = {slot for slot, *_ in walk.inputs[number]}
        for name, slot in _TIMES_DATA[node.name()].items():
            data = getattr(node, name, None)
            if slot in given or not isinstance(data, Tensor) or data.dim() < 2:
                continue
            if data.numel() in sizes or storage_of(data) in places:
                return min(leads[number])
    return None
