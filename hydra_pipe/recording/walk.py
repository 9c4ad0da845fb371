"""The autograd graph of one pass: its nodes, their parameters, and gradients through it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_CHECKPOINT = "CheckpointFunctionBackward"

# Nodes that may take samples to other places: always, along the first dimension, or by an index of
# it.
_ROUTING = ("MaskedSelectBackward0", "MaskedScatterBackward0", "TakeBackward0", "PutBackward0")
_ROUTING_BY_DIM = (
    *("IndexSelectBackward0", "IndexAddBackward0", "IndexCopyBackward0", "GatherBackward0"),
    *("ScatterBackward0", "ScatterAddBackward0", "SortBackward0", "TopkBackward0"),
)
_ROUTING_BY_INDEX = ("IndexBackward0", "IndexPutBackward0")


class Walk:
    """The nodes below the outputs of a pass, with numbers.

    The numbers are the same whenever the model does the same.

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
        #: hash that tells this graph from another
        self.signature = hash((tuple(names), tuple(sorted(self.leaves.items()))))
        #: True if a part of the pass has no graph yet: reentrant checkpointing makes it in the
        #: backward pass
        self.is_checkpointed = _CHECKPOINT in names

    def routes_samples(self, batch: int) -> bool:
        """Tell whether an index may take samples to other places, and change from step to step.

        Such an index gathers or scatters activations.
        """
        for node, at_inputs in zip(self.nodes, self.inputs, strict=True):
            name = node.name()
            if name in _ROUTING:
                return True
            if name in _ROUTING_BY_DIM and node._saved_dim == 0:
                return True
            if name in _ROUTING_BY_INDEX and not all(
                child in self.leaves for _, child, _ in at_inputs
            ):
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

    def leading_to(
        self, wanted: frozenset[int], but_through: Collection[int] = ()
    ) -> list[frozenset[int]]:
        """Return the blocks among `wanted` that each node leads to, by the node's number.

        Paths do not go on through the nodes `but_through`.
        """
        nothing: frozenset[int] = frozenset()
        found = [nothing] * len(self.nodes)
        for number, block in self.leaves.items():
            if block in wanted:
                found[number] = frozenset((block,))
        for number in self.deepest_first():
            below = [
                found[child]
                for _, child, _ in self.inputs[number]
                if found[child] and child not in but_through
            ]
            if below:
                found[number] = below[0] if len(below) == 1 else nothing.union(*below)
        return found

    def deepest_first(self) -> list[int]:
        """Return the numbers of the nodes, each after all nodes behind it."""
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


def _keeps_places(index: Tensor, batch: int) -> bool:
    """Tell whether an index of the first dimension takes each sample to its own place."""
    if index.dtype == torch.bool or index.dim() == 0 or len(index) != batch:
        return False
    places = torch.arange(batch, device=index.device).reshape(-1, *[1] * (index.dim() - 1))
    return bool((index == places).all())


def gradients_of(
    model: nn.Module, total: Tensor, wanted: Sequence[nn.Parameter]
) -> Sequence[Tensor | None]:
    """Return the gradients of a scalar, whatever checkpointing `model` uses.

    `.grad` is as before afterwards.
    """
    walk = Walk([total], {})
    if walk.is_checkpointed:
        return gradients_by_backward(walk, model, [total], [torch.ones_like(total)], wanted)
    return torch.autograd.grad(total, list(wanted), allow_unused=True)


def gradients_by_backward(
    walk: Walk,
    model: nn.Module,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    wanted: Sequence[nn.Parameter],
) -> list[Tensor | None]:
    """Return gradients by way of `.grad`, which is restored. The graph is kept.

    Reentrant checkpointing knows no other way.
    """
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
