"""Where the nodes of a graph keep the samples of a batch, and which of them mix the samples."""

from collections.abc import Callable, Sequence

from torch import Tensor

from hydra_pipe.per_sample.orders import FIRST, SampleOrder, order_of
from hydra_pipe.recording.walk import Walk

# Saved operands of nodes that multiply a parameter with data, and the inputs that they are.
_TIMES_DATA = {
    "MmBackward0": {"_saved_self": 0},
    "AddmmBackward0": {"_saved_mat1": 1},
    "BmmBackward0": {"_saved_self": 0},
    "MulBackward0": {"_saved_self": 0, "_saved_other": 1},
    "ConvolutionBackward0": {"_saved_input": 0},
}

# Orders of the gradients at the outputs of a node, by the node's number.
Orders = dict[int, tuple[SampleOrder | None, ...]]


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


def mixing_block(walk: Walk, probe: OrderProbe, inputs: Sequence[Tensor], wanted: frozenset[int]) -> int | None:
    """A block that is used where the samples of a batch are mixed; None: there is none.

    A node has mixed samples behind it if it multiplies a parameter with data, and one row of its output is reached
    from two samples. All samples share what is no data: a mask, a table of positions, frozen weights.

    Args:
        walk: of the graph.
        probe: has seen the gradients of some samples.
        inputs: of the model. Data are a part of one of them, or have as many elements, however they are arranged.
        wanted: blocks.
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
